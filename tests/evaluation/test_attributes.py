"""Classifiers of attributes and what is counted of their judgements, against loops over made-up images."""

import numpy as np
import pytest
from scipy.optimize import check_grad

from rq_jax.evaluation import attributes, descriptions
from rq_jax.evaluation.attributes import Claims, Classifiers
from rq_jax.evaluation.descriptions import Description

LABEL = "style"
VALUES = {"cat": {"fur": ("grey", "red", "white"), "eyes": ("open", "shut")}, "hill": {"sky": ("blue", "grey", "red")}}
N, A = 120, 9
UNKNOWN = 3  # of the images that are asked for something, the one whose value was never fitted


def describe(rng, label, named=()):
    return Description(label, {name: str(rng.choice(values)) for name, values in VALUES[label].items()}, tuple(named))


@pytest.fixture(scope="module")
def made():
    """Features, each description a direction of its own with noise, and the descriptions."""
    rng = np.random.default_rng(0)
    described = [describe(rng, str(rng.choice(["cat", "hill"]))) for _ in range(N)]
    directions = {}
    features = np.zeros((N, A))
    for row, one in enumerate(described):
        for pair in (("", one.label), *one.attributes.items()):
            features[row] += directions.setdefault((one.label, pair), rng.normal(size=A))
    return 5 + 3 * features + rng.normal(size=(N, A)), described


@pytest.fixture(scope="module")
def classifiers(made):
    return attributes.fit(*made, LABEL)


def heads_of(classifiers):
    """Columns by classifier and value."""
    heads = {}
    for (label, name, value), column in classifiers.columns.items():
        heads.setdefault((label, name), {})[value] = column
    return heads


def test_there_is_a_classifier_of_classes_and_one_for_each_attribute_of_each(made, classifiers):
    expected = {("", LABEL): ("cat", "hill")}
    expected |= {(label, name): values for label, table in VALUES.items() for name, values in table.items()}
    assert {head: tuple(columns) for head, columns in heads_of(classifiers).items()} == expected
    for (label, name), commonest in zip(sorted(expected), classifiers.commonest, strict=True):
        values = [one.attributes[name] if label else one.label for one in made[1] if label in ("", one.label)]
        assert commonest == max(map(values.count, values)) / len(values)


def test_probabilities_of_a_classifier_are_a_softmax(made, classifiers):
    found = classifiers.log_probabilities(made[0])
    logits = (made[0] - classifiers.center) * classifiers.scale @ classifiers.kernel + classifiers.bias
    for columns in heads_of(classifiers).values():
        some = list(columns.values())
        expected = np.exp(logits[:, some]) / np.exp(logits[:, some]).sum(1, keepdims=True)
        np.testing.assert_allclose(np.exp(found[:, some]), expected, rtol=1e-9)
    assert np.isneginf(found[:, -1]).all() and found.shape == (N, len(classifiers.bias) + 1)
    scaled = (made[0] - classifiers.center) * classifiers.scale
    np.testing.assert_allclose(np.sum(scaled**2), N, rtol=1e-9)  # unit variances over their number


def test_a_classifier_is_at_the_minimum_of_the_penalised_loss(made, classifiers):
    """Gradients are taken of a loss that is written down here."""
    features, described = made
    scaled = (features - classifiers.center) * classifiers.scale
    columns = heads_of(classifiers)["cat", "fur"]
    rows = [row for row, one in enumerate(described) if one.label == "cat"]
    targets = [list(columns).index(described[row].attributes["fur"]) for row in rows]

    def loss(params):
        kernel, bias = params[:-3].reshape(A, 3), params[-3:]
        nats = 0.0
        for row, target in zip(rows, targets, strict=True):
            logits = scaled[row] @ kernel + bias
            nats -= logits[target] - np.log(np.exp(logits).sum())
        return nats / len(rows) + attributes.PENALTY / 2 * np.sum(kernel**2)

    where = list(columns.values())
    found = np.concatenate([classifiers.kernel[:, where].ravel(), classifiers.bias[where]])
    slope = check_grad(loss, lambda params: np.zeros_like(params), found)  # the norm of the gradient
    assert slope < 1e-3 * check_grad(loss, lambda params: np.zeros_like(params), 0 * found)


def test_what_was_fitted_is_recognised(made, classifiers):
    found = classifiers.log_probabilities(made[0])
    for name in ("fur", "eyes"):
        columns = heads_of(classifiers)["cat", name]
        rows = [row for row, one in enumerate(made[1]) if one.label == "cat"]
        best = np.array(list(columns))[found[rows][:, list(columns.values())].argmax(1)]
        assert np.mean(best == [made[1][row].attributes[name] for row in rows]) > 0.9


@pytest.fixture(scope="module")
def judged(made, classifiers):
    """What is asked of some images, every second time what they show; the claims, and log-probabilities."""
    rng, asked = np.random.default_rng(1), []
    for i, one in enumerate(made[1][:60]):
        shown = one if i % 2 else describe(rng, one.label)
        asked.append(shown._replace(named=tuple(VALUES[one.label])[: i % 3]))
    asked[UNKNOWN] = Description("cat", {"fur": "plaid", "eyes": "open"}, ("fur",))
    seen = descriptions.seen_combinations(one for one in asked if one.attributes.get("fur") != "red")
    log_probabilities = classifiers.log_probabilities(made[0][: len(asked)])
    return asked, Claims.of(asked, classifiers, LABEL, seen), log_probabilities


def likeliest(classifiers, log_probabilities, row, label, name):
    columns = heads_of(classifiers)[label, name]
    return max(columns, key=lambda value: log_probabilities[row, columns[value]])


def test_shares_are_counted_by_attribute_class_and_combination(classifiers, judged):
    asked, claims, log_probabilities = judged
    hits, both = {}, []
    for row, one in enumerate(asked):
        found = {LABEL: likeliest(classifiers, log_probabilities, row, "", LABEL) == one.label}
        for name in one.named:
            found[name] = likeliest(classifiers, log_probabilities, row, one.label, name) == one.attributes[name]
        for name, hit in found.items():
            hits.setdefault(name, []).append((one.label, hit))
        if one.attributes.get("fur") == "red" and len(one.named) == 2:
            both.append(found["fur"] and found["eyes"])
    is_seen = claims.seen_in(log_probabilities, classifiers)
    shares = claims.shares(is_seen)
    every = [hit for found in hits.values() for _, hit in found]
    assert 0 < np.mean(every) < 1 and 0 < np.mean(both) < 1
    assert shares["accuracy"] == pytest.approx(np.mean(every))
    assert shares["combinations"] == pytest.approx(np.mean(both)) and len(claims.pairs) == len(both)
    assert shares["by_attribute"] == {name: pytest.approx(np.mean([hit for _, hit in found])) for name, found in hits.items()}  # fmt: skip
    for label, names in (("cat", ("eyes", "fur", LABEL)), ("hill", ("sky", LABEL))):
        expected = {name: np.mean([hit for of, hit in hits[name] if of == label]) for name in names}
        assert shares["by_class"][label] == pytest.approx(expected)
    assert claims.asked() == {name: len(found) for name, found in sorted(hits.items())}
    for row in range(len(asked)):
        expected = [name for name in (LABEL, *asked[row].named) if not is_seen[(claims.rows == row) & (claims.names == name)][0]]  # fmt: skip
        assert claims.missed(is_seen, row) == expected
    assert "fur" in claims.missed(is_seen, UNKNOWN)


def test_chance_is_the_share_of_the_commonest_value(made, classifiers, judged):
    asked, claims, _ = judged
    shares = claims.shares(claims.chances(classifiers))
    values = [one.attributes["sky"] for one in made[1] if one.label == "hill"]
    assert shares["by_attribute"]["sky"] == pytest.approx(max(map(values.count, values)) / len(values))
    of_cats = [[one.attributes[name] for one in made[1] if one.label == "cat"] for name in ("fur", "eyes")]
    commonest = [max(map(some.count, some)) / len(some) for some in of_cats]
    assert shares["combinations"] == pytest.approx(np.prod(commonest))
    count = sum("fur" in one.named for one in asked)
    assert shares["by_attribute"]["fur"] == pytest.approx(commonest[0] * (count - 1) / count)  # one never fitted


def test_captions_are_found_by_their_mean_log_probability(classifiers, judged):
    asked, claims, log_probabilities = judged
    candidates = attributes.draw_candidates(len(asked))
    assert candidates.shape == (60, 10) and (candidates[:, 0] == np.arange(60)).all()
    assert all(len(set(row)) == 10 and 0 <= min(row) and max(row) < 60 for row in candidates.tolist())
    columns = classifiers.columns
    expected = np.zeros(candidates.shape)
    for row, some in enumerate(candidates):
        for place, other in enumerate(some):
            one = asked[other]
            values = [("", LABEL, one.label), *((one.label, name, one.attributes[name]) for name in one.named)]
            scores = [log_probabilities[row, columns[value]] if value in columns else -np.inf for value in values]
            expected[row, place] = np.mean(scores)
    scores = claims.scores(log_probabilities, candidates)
    np.testing.assert_allclose(scores, expected, rtol=1e-9)
    best = [row[0] >= max(row[1:]) and row[0] > -np.inf for row in expected]
    assert attributes.retrieved(scores) == pytest.approx(np.mean(best)) and 0 < np.mean(best) < 1


def test_equal_captions_are_as_right_as_an_image_s_own():
    scores = np.array([[0.0, 0.0, -1.0], [-2.0, -1.0, -3.0], [-np.inf, -np.inf, -np.inf], [0.5, 0.1, 0.2]])
    assert attributes.retrieved(scores) == 0.5


def test_combinations_are_of_one_class_and_of_both_values():
    one = Description("cat", {"fur": "red", "eyes": "open", "tail": "long"})
    other = Description("dog", {"fur": "grey", "eyes": "shut"})
    seen = descriptions.seen_combinations([one, other])
    assert len(seen) == 4 and ("cat", "eyes", "open", "fur", "red") in seen
    new = Description("dog", {"fur": "red", "eyes": "open"}, ("eyes", "fur"))
    assert [pair for pair in new.combinations(new.named) if pair not in seen] == [("dog", "eyes", "open", "fur", "red")]


def test_a_feature_that_never_changes_plays_no_part(made):
    features, described = made
    features = np.concatenate([features, np.full((N, 1), 7.0)], axis=1)
    found = attributes.fit(features, described, LABEL)
    assert isinstance(found, Classifiers) and np.isfinite(found.kernel).all()
    moved = features + np.eye(A + 1)[-1] * 1e-9
    np.testing.assert_allclose(found.log_probabilities(moved), found.log_probabilities(features), atol=1e-6)
