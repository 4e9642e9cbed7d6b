"""RQ-VAE and RQ-Transformer (Lee et al., CVPR 2022) in JAX and Flax: train, sample, measure.

===============  ===================================================================================
quantize         codebook search, residual quantization, moving average, the Flax module
nn               convolution blocks, causal attention and its cache, weights for inference
models           RQ-VAE, DQ-VAE, RQ- and DQ-Transformer, discriminator; their cost in FLOPs
sampling         logit filter, the sampling loops, rejection sampling
grains           grains of regions, routing by entropy, codes to tokens and back (DQ-VAE)
losses, metrics  arrays of losses; PSNR, SSIM, code usage, kernel distance
settings         checks of settings, construction from a config section
data             datasets, grain pipelines, transforms, captions, latent cache
devices          meshes, hosts, memory, peak rates
checkpoint       save, resume, load, ship
interop          safe readers of foreign files; official names and ours
pretrained       frozen networks that judge images
report           grids, curves, progress
evaluation       tokenizers, samples and likelihoods on held-out images
export           programs of a model that jax alone runs
training         the loop, optimizer, settings, logs, signals
recipes          losses, step and evaluation of each kind of model
===============  ===================================================================================

Array names end in the letters of their axes, as in `images_BHWC` or `codes_BhwD`:

======  ====================================  ======  ==============================================
B       batch                                 U       condition length
H W C   image height, width, channels         M       model width
h w     code grid                             F       MLP width
E       length of a code vector               N       heads (`quantize`: vectors)
D       code depth, never model width         A       width of a head
K       codes in a codebook                   L       layers
T       positions in raster order, h * w      S       cached keys
u v     grid of regions                       G       grains, 0 is coarse
P       packed length
======  ====================================  ======  ==============================================
"""

__version__ = "0.1.0"
