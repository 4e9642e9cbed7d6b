"""Outputs of the PyTorch originals of frozen networks on random weights, for tests that have no PyTorch.

`python tests/goldens/make_extractor_goldens.py` writes extractors/<name>.npz beside itself, for each of `ORIGINALS`. It
needs torch, torchvision, pytorch-fid and clip-anytorch. A file holds the names and shapes of the state dict and a few
outputs, no weights: `draw_state` draws these again, and `draw_image` the image.
"""

import json
import math
from pathlib import Path

import numpy as np

DIRECTORY = Path(__file__).parent / "extractors"
SEED = 7
IMAGE_SIZE = (40, 56)  # of the golden outputs
# Features; image side, layers, width and patch; length, vocabulary, width and layers of texts: a narrow CLIP.
CLIP_SIZES = (24, 224, 2, 128, 32, 77, 49408, 64, 2)
CAPTIONS = (
    "a photo of a cat", "A RED  car!!!  isn't it?", "naïve café — “quoted” ‘x’", "&amp;lt;b&amp;gt; x &quot;y&quot;",
    "12345 67", "日本語のテキスト", "🙂👩‍👩‍👧 family", "ΟΔΟΣ Σ", "İstanbul ß ﬁ ﬀ", "l’été n'est pas'S 'RE", "", "   ",
    "<|endoftext|> in the middle <|startoftext|>", "a_b-c/d\\e@f.com", "x" * 300, "word " * 100, "mojibake donâ€™t",
    "tab\tnew\nline\u00a0no break\u200bzero width", "½ ² Ⅷ ٣", "e\u0301", "a<|EndOfText|>b",
)  # fmt: skip
_LIBRARY = []  # lives as long as the operations that it defines


def _uniform(generator, shape):
    """Uniform numbers in [-1, 1) from the raw bits of PCG64, whose stream NumPy never changes."""
    raw = np.asarray(generator.random_raw(math.prod(shape)), np.uint64)
    return ((raw >> np.uint64(40)).astype(np.float32) / np.float32(2**23) - np.float32(1)).reshape(shape)


def draw_state(shapes, seed=SEED):
    """Weights that keep activations near 1, with statistics and biases that matter.

    Args:
      shapes: name of each array -> its shape, in the order in which they are drawn.
      seed: of the generator.

    Returns:
      name -> float32 array.
    """
    generator, state = np.random.PCG64(seed), {}
    for name, shape in shapes.items():
        u = _uniform(generator, shape)
        if name.endswith("running_var"):
            state[name] = 1 + u / 2
        elif name == "logit_scale":
            state[name] = np.asarray(4.5 + u / 10, np.float32)
        elif name.endswith(("bn3.weight", "downsample.1.weight")):  # what a residual block adds
            state[name] = 0.4 + u / 5
        elif len(shape) > 1:
            state[name] = u * np.float32(math.sqrt(6 / math.prod(shape[1:])))
        else:
            state[name] = 1 + u / 2 if name.endswith("weight") else u / 10
    return state


def draw_image(height, width, seed=0):
    """(1, H, W, 3) in [-1, 1]: waves of several lengths and noise, so that every resize matters."""
    u = _uniform(np.random.PCG64(seed), (1, height, width, 3))
    y, x = np.mgrid[:height, :width]
    waves = np.stack([np.sin(x / 3 + y / 5), np.cos(x / 7 - y / 4), np.sin(y / 2)], -1)
    return (0.6 * waves + 0.4 * u).astype(np.float32)


def read(name):
    """(shapes, outputs) of a committed file."""
    with np.load(DIRECTORY / f"{name}.npz") as file:
        arrays = dict(file)
    return dict(json.loads(str(arrays.pop("shapes")))), arrays


def shapes_of(network):
    """Names and shapes of what a loader has to find in a state dict."""
    return {
        name: tuple(array.shape)
        for name, array in network.state_dict().items()
        if not name.endswith("num_batches_tracked")
    }


def load_random(network):
    """The network in evaluation with the weights of `draw_state`."""
    import torch

    state = {name: torch.tensor(array) for name, array in draw_state(shapes_of(network)).items()}
    network.load_state_dict(state, strict=False)
    return network.eval()


def import_torchvision():
    """torchvision, also where its compiled operations, which nothing here needs, do not fit the torch that is there."""
    import torch

    if not _LIBRARY and not hasattr(torch.ops.torchvision, "nms"):
        _LIBRARY.append(torch.library.Library("torchvision", "DEF"))
        for name in ("nms", "qnms"):
            _LIBRARY[0].define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    import torchvision

    return torchvision


def inception():
    """pytorch-fid's network, without the download of its weights."""
    import_torchvision()
    from pytorch_fid import inception as original

    original.load_state_dict_from_url = lambda *args, **settings: {}
    original.torchvision.models.Inception3.load_state_dict, kept = lambda *args: None, original.torchvision.models.Inception3.load_state_dict  # fmt: skip
    try:
        return original.fid_inception_v3()
    finally:
        original.torchvision.models.Inception3.load_state_dict = kept


def inception_outputs(network, images):
    """Features and logits of images (B, H, W, 3) in [-1, 1], through pytorch-fid's own preprocessing and blocks."""
    import torch
    from pytorch_fid import inception as original

    original.fid_inception_v3 = lambda: network
    wrapped = original.InceptionV3([3]).eval()
    with torch.no_grad():
        features = wrapped((torch.tensor(images).permute(0, 3, 1, 2) + 1) / 2)[0][:, :, 0, 0]
        return {"features": features.numpy(), "logits": network.fc(features).numpy()}


def resnet():
    return import_torchvision().models.resnet101(weights=None)


def resnet_outputs(network, images):
    """Features and logits of images (B, H, W, 3) in [-1, 1], preprocessed as torchvision's weights of 2015 want it."""
    import torch
    from torchvision.transforms import functional as F

    x = (torch.tensor(images).permute(0, 3, 1, 2) + 1) / 2
    x = F.center_crop(F.resize(x, 256, F.InterpolationMode.BILINEAR, antialias=True), 224)
    x = F.normalize(x, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    fc, network.fc = network.fc, torch.nn.Identity()
    with torch.no_grad():
        features = network(x)
        network.fc = fc
        return {"features": features.numpy(), "logits": fc(features).numpy()}


def clip(sizes=CLIP_SIZES):
    """OpenAI's network; the sizes in the order of its arguments, which its heads follow from."""
    import_torchvision()
    from clip import model

    *most, text_width, text_layers = sizes
    return model.CLIP(*most, text_width, text_width // 64, text_layers)


def clip_tokens(captions=CAPTIONS):
    import_torchvision()
    from clip import tokenize

    return tokenize(list(captions), truncate=True).numpy().astype(np.int32)


def clip_outputs(network, images):
    """Features of images (B, H, W, 3), which are rounded to 8 bits, of `CAPTIONS`, and logits, all through its own code."""
    import torch
    from clip import clip as original
    from PIL import Image

    preprocess = original._transform(network.visual.input_resolution)
    as_bytes = np.floor((images + 1) * 127.5 + 0.5).astype(np.uint8)
    with torch.no_grad():
        x = torch.stack([preprocess(Image.fromarray(image)) for image in as_bytes])
        tokens = torch.tensor(clip_tokens())
        outputs = {"features": network.encode_image(x), "text_features": network.encode_text(tokens)}
        outputs["logits"] = network(x, tokens)[0]
    return {"tokens": tokens.numpy(), **{name: array.numpy() for name, array in outputs.items()}}


ORIGINALS = {
    "inception": (inception, inception_outputs),
    "resnet": (resnet, resnet_outputs),
    "clip": (clip, clip_outputs),
}


def main():
    DIRECTORY.mkdir(exist_ok=True)
    for name, (make, outputs) in ORIGINALS.items():
        network = make()
        shapes = json.dumps(list(shapes_of(network).items()))
        made = outputs(load_random(network), draw_image(*IMAGE_SIZE))
        np.savez_compressed(DIRECTORY / f"{name}.npz", shapes=shapes, **made)
        print(name, {key: (array.shape, float(np.abs(array).max())) for key, array in made.items()})


if __name__ == "__main__":
    main()
