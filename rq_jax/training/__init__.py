"""How anything is trained: the loop, its state, its settings, its log. Knows no model."""
