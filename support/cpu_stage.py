"""FastStage: a dense block with its transition on the CPU, faster and in less memory than the modules."""
import os
import threading
from collections import namedtuple
from concurrent.futures import ThreadPoolExecutor, wait

import torch
from torch import nn
from torch.nn import functional as F

# Mode 'auto' uses the modules for smaller inputs. The reason is not speed: the modules round as the published code
# does, and tests compare 64 x 64 inputs with its golden gradients. (The fast path's are closer to those in float64.)
MIN_PIXELS = 80 * 80
MIN_GROWTH_RATE = 16    # mode 'auto' uses the modules for narrower networks too: their matrix products are too small
BAND_PIXELS = 10816     # a thread works on a band of whole rows with about so many pixels
STRIP_PIXELS = 2704     # a band is computed in strips of about so many pixels: all intermediate results fit the cache
# one layer or transition; batch_statistics: whether batch norm uses the moments of the batch; slope: of the LeakyReLU
LayerSpec = namedtuple('LayerSpec', 'bn batch_statistics slope dilation drop_rate')


def is_large(x):
    """Whether images (B, C, H, W) have MIN_PIXELS pixels or more."""
    return x.shape[-2] * x.shape[-1] >= MIN_PIXELS


def suits(stages, x):
    """Whether `run` should compute the Stages of x. Raises ValueError if their mode is 'fast' and `run` cannot."""
    if stages.mode == 'plain':
        return False
    obstacle = obstacle_to_fast(stages, x)
    if stages.mode == 'fast' and obstacle:
        raise ValueError(f"mode 'fast' is not possible: {obstacle}; use 'auto' or 'plain'")
    return stages.mode == 'fast' or (not obstacle and is_worth_it(stages, x))


def is_worth_it(stages, x):
    """Whether FastStage is likely to be no slower than the modules, or is asked to save memory."""
    growth_rate = len(stages.block1.denselayer1.conv.conv.weight)
    wide = growth_rate >= MIN_GROWTH_RATE or stages.memory_efficient or stages.amp
    return is_large(x) and x.dtype == torch.float32 and wide


def obstacle_to_fast(stages, x):
    """The reason why FastStage cannot compute this input, str, or None."""
    if x.device.type != 'cpu' or torch.is_autocast_enabled('cpu'):
        return 'it needs the CPU, without autocast'
    if torch.jit.is_tracing() or torch.compiler.is_compiling():
        return 'the network is being traced or compiled'
    if x.dim() != 4 or x.numel() == 0:
        return f'the input has shape {tuple(x.shape)}'
    if not hasattr(stages.block1.denselayer1, 'conv'):
        return "it needs layer_type 'basic'"
    for module in stages.modules():
        if hasattr(module, 'bn'):                                 # a ConvLayer
            conv, bn = module.conv, module.bn
            if type(bn) is not nn.BatchNorm2d or bn.momentum is None or not bn.affine or bn.running_mean is None:
                return f'it needs an unchanged nn.BatchNorm2d, found {bn}'
            if conv.weight.dtype != x.dtype:
                return f'weights are {conv.weight.dtype}, the input is {x.dtype}'
    return None


def run(stages, x):
    """Compute all stages of a network, each dense block with its transition as one FastStage.

    Hooks on the modules inside are not called. stages.memory_efficient: recompute the features in the backward pass
    instead of keeping them. stages.amp: features, gradients and products are bfloat16.
    """
    dtype = x.dtype
    for name, module in stages.named_children():
        if name.startswith('block'):
            block = module                                        # computed together with the transition after it
        elif name.startswith('trans'):
            x = run_fast(block, module, x, stages.memory_efficient, torch.bfloat16 if stages.amp else dtype)
        else:
            x = module(x)                                         # resampling
    return x.to(dtype)


def run_fast(block, transition, x, memory_efficient, dtype):
    """transition(block(x)) by FastStage, computed and returned as `dtype`. x: (B, C, H, W) on the CPU, any layout."""
    specs, parameters = [], []
    for layer in (*block.children(), transition):
        conv_layer, drop_rate = (transition, 0) if layer is transition else (layer.conv, layer.drop_rate)
        specs.append(LayerSpec(conv_layer.bn, conv_layer.bn.training, conv_layer.relu.negative_slope,
                               conv_layer.conv.dilation[0], drop_rate if layer.training else 0))
        parameters += [conv_layer.conv.weight, conv_layer.bn.weight, conv_layer.bn.bias]
    save = torch.is_grad_enabled() and (x.requires_grad or any(p.requires_grad for p in parameters))
    if save or any(spec.batch_statistics or spec.drop_rate for spec in specs):
        return FastStage.apply(x, specs, save, memory_efficient, dtype, *parameters)
    # the images of the batch are independent here, and one at a time needs less memory
    images = [FastStage.apply(image, specs, save, memory_efficient, dtype, *parameters) for image in x.split(1)]
    return images[0] if len(images) == 1 else torch.cat(images)


class FastStage(torch.autograd.Function):
    """A dense block of `n` basic layers (growth rate g) and its transition, as one function with its own gradient.

    Its results are those of the modules, up to rounding. Why it is fast, for one image of N = H * W pixels:

    - All features of the block are the rows of one matrix X (C + n * g, N). Layer k reads the first c_k rows and
      writes the next g, so nothing is ever concatenated.
    - The 3x3 convolution of an output row y is three matrix products and two shifted additions. V_i (3 * g, c_k) holds
      the weights of the taps (i, -1), (i, 0), (i, 1), for i = -1, 0, 1:
          Y(y) = sum over i of V_i X[:c_k, row y + i * dilation]        (3 * g, W), as three parts Y_-1, Y_0, Y_1
          out(y, x) = sum over j of Y_j(y, x + j * dilation)
    - Backward, G9 (9 * g, N) holds nine shifted copies of the gradient of `out`, W9 (9 * g, c_k) the weights, and
          dX[:c_k] += W9^T G9        dW9 += G9 X[:c_k]^T
      The first product adds to dX in place, so that features used by many layers need no separate additions.
    - Y and G9 never exist as a whole. They are computed and used in strips of a few rows, which fit the cache.
    - Each thread works on bands of rows, and threads wait for each other only between the steps of a layer. The bands,
      and so the results, do not depend on the number of threads.
    - Dropout makes four decisions from each 64-bit random number.

    Kept for the backward pass: X, the output of each LeakyReLU (its sign is that of the input too), and the dropout
    masks as bytes. With `memory_efficient`, X and the transition's output are recomputed from the block's input and the
    other two, which needs no 3x3 convolution.

    With dtype bfloat16, all tensors (B, C, H, W) are bfloat16; moments and parameters stay float32.
    """

    @staticmethod
    def forward(ctx, x, specs, save, memory_efficient, dtype, *parameters):
        weights, gammas, betas = parameters[::3], parameters[1::3], parameters[2::3]
        growth_rate, channels = len(weights[0]), x.shape[1]
        activations, masks, moments = [], [], []
        with Workers() as workers:
            features = copy_channels(x, weights[-1].shape[1], dtype, workers)
            for spec, weight, gamma, beta in zip(specs[:-1], weights, gammas, betas):
                if not (save or spec.batch_statistics or spec.drop_rate):       # testing: one pass is enough
                    rows = features[:, channels:channels + growth_rate]
                    conv3x3(features[:, :channels], weight, spec, workers, rows,
                            batch_norm_line(gamma, beta, spec.bn.running_mean, spec.bn.running_var, spec))
                    channels += growth_rate
                    continue
                mask = workers.submit(dropout_mask, (len(x), growth_rate, *x.shape[2:]), spec.drop_rate)
                activation, mean, var = conv3x3(features[:, :channels], weight, spec, workers)
                rows, mask = features[:, channels:channels + growth_rate], mask()
                normalise(activation, mean, var, gamma, beta, spec, mask, rows, workers)
                channels += growth_rate
                if save:
                    activations.append(activation)
                    masks.append(mask)
                    moments += [mean, var]
            activation, mean, var = conv1x1(features, weights[-1], specs[-1], workers)
            out = torch.empty_like(activation) if save else activation
            normalise(activation, mean, var, gammas[-1], betas[-1], specs[-1], None, out, workers)
        if save:
            ctx.specs, ctx.memory_efficient, ctx.dtypes = specs, memory_efficient, (x.dtype, dtype)
            big = (x,) if memory_efficient else (features, activation)
            ctx.save_for_backward(*parameters, *moments, mean, var, *activations, *masks, *big)
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        specs, n = ctx.specs, len(ctx.specs) - 1
        saved = iter(ctx.saved_tensors)
        weights, gammas, betas = zip(*[[next(saved) for _ in range(3)] for _ in specs])
        moments = [(next(saved), next(saved)) for _ in specs]
        activations = [next(saved) for _ in range(n)]
        masks = [next(saved) for _ in range(n)]
        growth_rate, in_channels = len(weights[0]), weights[0].shape[1]
        grads = [None] * (3 * n + 3)
        with Workers() as workers:
            if ctx.memory_efficient:
                features = copy_channels(next(saved), weights[-1].shape[1], ctx.dtypes[1], workers)
                rows = features[:, in_channels:].split(growth_rate, dim=1)
                for k in range(n):
                    normalise(activations[k], *moments[k], gammas[k], betas[k], specs[k], masks[k], rows[k], workers)
                activation = conv1x1(features, weights[-1], specs[-1]._replace(batch_statistics=None), workers)[0]
            else:
                features, activation = saved

            grad, *grads[-2:] = normalise_backward(grad, activation, *moments[-1], gammas[-1], specs[-1], None, 0,
                                                   workers)
            grad_features, grads[-3] = conv1x1_backward(features, weights[-1], grad, workers)
            del activation, grad
            for k in reversed(range(n)):
                channels = in_channels + k * growth_rate
                grad, grads[3 * k + 1], grads[3 * k + 2] = normalise_backward(
                    grad_features[:, channels:channels + growth_rate], activations[k], *moments[k], gammas[k],
                    specs[k], masks[k], specs[k].dilation, workers)
                grads[3 * k] = conv3x3_backward(features[:, :channels], weights[k], specs[k].dilation, grad,
                                                grad_features[:, :channels], workers)
            grad_x = copy_channels(grad_features[:, :in_channels], in_channels, ctx.dtypes[0], workers)
        return (grad_x, None, None, None, None, *grads)


class Workers:
    """A context in which Python threads share the work, as many as torch uses. Inside, torch operations use one thread.

    These threads wait for each other only after whole bands. Torch's own threads wait in every operation, which costs
    much more time, above all if other programs run too.
    """

    lock = threading.Lock()
    active = 0          # number of open contexts, of all threads
    pools = {}          # number of threads -> ThreadPoolExecutor

    def __enter__(self):
        with self.lock:
            if Workers.active == 0:
                Workers.threads = torch.get_num_threads()
            torch.set_num_threads(1)            # holds for this thread
            Workers.active += 1
            if self.threads > 1 and self.threads not in self.pools:
                self.pools[self.threads] = ThreadPoolExecutor(self.threads)
        self.inference = torch.is_inference_mode_enabled()
        self.futures = set()
        return self

    def __exit__(self, *_):
        try:
            wait(self.futures.copy())       # after an error some may still run
        finally:
            with self.lock:
                Workers.active -= 1
                torch.set_num_threads(self.threads)

    def submit(self, function, *args):
        """Start function(*args) in a thread. Returns a function that waits for its result."""
        if self.threads == 1:
            result = function(*args)
            return lambda: result
        future = self.pools[self.threads].submit(self.call, function, *args)
        self.futures.add(future)
        future.add_done_callback(self.futures.discard)
        return future.result

    def call(self, function, *args):
        """function(*args), in a thread of the pool."""
        # these three settings belong to a thread
        torch.set_num_threads(1)
        with torch.inference_mode(self.inference), torch.no_grad():
            return function(*args)

    def for_bands(self, function, shape):
        """Call function(b, rows) for each band of rows of each image b. shape: (B, C, H, W). Returns the results."""
        batch, _, height, width = shape
        pending = [self.submit(function, b, rows) for b in range(batch)
                   for rows in split_rows(slice(0, height), width, BAND_PIXELS)]
        return [result() for result in pending]


if hasattr(os, 'register_at_fork'):         # not on Windows
    os.register_at_fork(after_in_child=Workers.pools.clear)     # threads do not survive a fork


def split_rows(rows, width, pixels):
    """Cut a slice of rows into nearly equal slices of at most about `pixels` pixels each."""
    height = rows.stop - rows.start
    n = min(height, -(-height * width // pixels))
    edges = [rows.start + height * i // n for i in range(n + 1)]
    return [slice(top, bottom) for top, bottom in zip(edges, edges[1:])]


def copy_channels(x, channels, dtype, workers):
    """A new tensor (B, channels, H, W) whose first channels are a copy of x; the others are not initialised."""
    result = x.new_empty(len(x), channels, *x.shape[2:], dtype=dtype)

    def copy(b, rows):
        result[b, :x.shape[1], rows] = x[b, :, rows]
    workers.for_bands(copy, x.shape)
    return result


def conv3x3(features, weight, spec, workers, out=None, line=None):
    """LeakyReLU of the dilated 3x3 convolution of features (B, c, H, W).

    out: a view (B, g, H, W) to write to, by default a new tensor. line: (scale, shift), both (g, 1, 1), of a batch norm
    to apply too. Returns `out` and its mean and variance, of `batch_moments`.
    """
    batch, channels, height, width = features.shape
    growth_rate, d = len(weight), spec.dilation
    taps = weight.permute(2, 3, 0, 1).reshape(3, 3 * growth_rate, channels).to(features.dtype)
    if out is None:
        out = features.new_empty(batch, growth_rate, height, width)

    def convolve(b, rows):
        matrix = features[b].flatten(1)
        strips = split_rows(rows, width, STRIP_PIXELS)
        buffer = matrix.new_empty(3 * growth_rate * width * max(strip.stop - strip.start for strip in strips))
        for strip in strips:
            n = (strip.stop - strip.start) * width
            y = buffer[:3 * growth_rate * n].view(3 * growth_rate, n)
            torch.mm(taps[1], matrix[:, strip.start * width:strip.stop * width], out=y)
            for i, shift in ((0, -d), (2, d)):
                top, bottom = max(strip.start, -shift), min(strip.stop, height - shift)     # inside the image
                if top < bottom:
                    y[:, (top - strip.start) * width:(bottom - strip.start) * width].addmm_(
                        taps[i], matrix[:, (top + shift) * width:(bottom + shift) * width])
            left, centre, right = y.view(3, growth_rate, -1, width)
            if d < width:
                centre[..., d:] += left[..., :-d]
                centre[..., :-d] += right[..., d:]
            if line is None:
                torch.ops.aten.leaky_relu.out(centre, spec.slope, out=out[b, :, strip])
            else:
                scale, shift = line
                torch.mul(F.leaky_relu_(centre, spec.slope), scale, out=out[b, :, strip]).add_(shift)
        return moments(out[b, :, rows], spec)
    return out, *batch_moments(workers.for_bands(convolve, out.shape), spec)


def conv3x3_backward(features, weight, d, grad, grad_features, workers):
    """Backward pass of the convolution in `conv3x3`.

    grad: gradient of its output, with d rows and columns of zeros around it, (B, g, H + 2d, W + 2d). The gradient of
    the features is added to grad_features (B, c, H, W). Returns the gradient of the weight.
    """
    (channels, _, width), growth_rate = features.shape[1:], len(weight)
    w9 = weight.flip(2, 3).permute(2, 3, 0, 1).reshape(-1, channels).to(features.dtype)
    _, channel_stride, row_stride, _ = grad.stride()

    def convolve(b, rows):
        matrix, grad_matrix = features[b].flatten(1), grad_features[b].flatten(1)
        grad_w9 = torch.zeros_like(w9, dtype=weight.dtype)
        strips = split_rows(rows, width, STRIP_PIXELS)
        buffer = matrix.new_empty(len(w9) * width * max(strip.stop - strip.start for strip in strips))
        for strip in strips:
            shifted = grad[b].as_strided((3, 3, growth_rate, strip.stop - strip.start, width),
                                         (d * row_stride, d, channel_stride, row_stride, 1),
                                         grad[b].storage_offset() + strip.start * row_stride)
            g9 = buffer[:shifted.numel()].view(shifted.shape).copy_(shifted).view(len(w9), -1)
            pixels = slice(strip.start * width, strip.stop * width)
            grad_matrix[:, pixels].addmm_(w9.t(), g9)
            add_product(grad_w9, g9, matrix[:, pixels].t())
        return grad_w9
    grad_w9 = sum(workers.for_bands(convolve, features.shape))
    return grad_w9.view(3, 3, growth_rate, channels).permute(2, 3, 0, 1).flip(2, 3)


def conv1x1(features, weight, spec, workers):
    """LeakyReLU of the 1x1 convolution of features (B, C, H, W): (B, out channels, H, W), its mean and variance."""
    width, matrix = features.shape[3], weight.flatten(1).to(features.dtype)
    out = features.new_empty(len(features), len(weight), *features.shape[2:])

    def convolve(b, rows):
        for strip in split_rows(rows, width, STRIP_PIXELS):
            pixels = slice(strip.start * width, strip.stop * width)
            torch.mm(matrix, features[b].flatten(1)[:, pixels], out=out[b].flatten(1)[:, pixels])
        F.leaky_relu_(out[b, :, rows], spec.slope)
        return moments(out[b, :, rows], spec)
    return out, *batch_moments(workers.for_bands(convolve, out.shape), spec)


def conv1x1_backward(features, weight, grad, workers):
    """Gradients of the features, (B, C, H, W), and of the weight. grad: of the output, (B, out channels, H, W)."""
    width = features.shape[3]
    grad_features = torch.empty_like(features)
    matrix = weight.flatten(1).to(features.dtype)

    def convolve(b, rows):
        grad_matrix = torch.zeros_like(matrix, dtype=weight.dtype)
        for strip in split_rows(rows, width, STRIP_PIXELS):
            pixels = slice(strip.start * width, strip.stop * width)
            g = grad[b].flatten(1)[:, pixels]
            torch.mm(matrix.t(), g, out=grad_features[b].flatten(1)[:, pixels])
            add_product(grad_matrix, g, features[b].flatten(1)[:, pixels].t())
        return grad_matrix
    return grad_features, sum(workers.for_bands(convolve, features.shape)).view_as(weight)


def add_product(total, a, b):
    """total += a b, a matrix product. total may have a more precise type than a and b."""
    if total.dtype == a.dtype:
        total.addmm_(a, b)
    else:
        total += a @ b


def moments(band, spec):
    """Of a band (g, rows, W): number of pixels, mean (g,), and sum of squared differences from the mean (g,).

    None if batch norm does not use the statistics of the batch.
    """
    if spec.batch_statistics:
        band = band.to(spec.bn.weight.dtype)
        mean = band.mean((1, 2))
        return band[0].numel(), mean, torch.linalg.vector_norm(band - mean[:, None, None], dim=(1, 2)) ** 2


def batch_moments(bands, spec):
    """Mean and biased variance (g,) of a batch, from the `moments` of its bands; updates the running moments.

    If batch norm does not use the statistics of the batch: the running mean and variance.
    """
    bn = spec.bn
    if not spec.batch_statistics:
        return bn.running_mean, bn.running_var
    counts, means, squares = zip(*bands)
    counts, means, squares = means[0].new_tensor(counts)[:, None], torch.stack(means), torch.stack(squares)
    count = counts.sum()
    if count == 1:
        raise ValueError('Expected more than 1 value per channel when training, found a batch of one pixel')
    mean = (counts * means).sum(0) / count
    squares = (squares + counts * (means - mean) ** 2).sum(0)
    bn.num_batches_tracked += 1
    bn.running_mean.lerp_(mean, bn.momentum)
    bn.running_var.lerp_(squares / (count - 1), bn.momentum)
    return mean, squares / count


def keep_threshold(drop_rate):
    """How many of the 65536 values of a 16-bit number mean 'drop', int, and the probability of keeping, float."""
    dropped = round(drop_rate * 65536)
    return dropped, 1 - dropped / 65536


def dropout_mask(shape, drop_rate):
    """A random mask, uint8 of this shape, 1 = keep; None without dropout.

    Each 64-bit number of torch's CPU generator makes four decisions of 16 bits.
    """
    dropped, _ = keep_threshold(drop_rate)
    if not dropped:
        return None
    mask = torch.empty(shape, dtype=torch.uint8)
    numbers = torch.empty(-(-mask.numel() // 4), dtype=torch.int64).random_(-2 ** 63, None).view(torch.int16)
    return torch.ge(numbers[:mask.numel()].view(shape), dropped - 32768, out=mask)


def batch_norm_line(gamma, beta, mean, var, spec):
    """Batch norm with these moments, (g,), as scale * x + shift. Returns (scale, shift), both (g, 1, 1)."""
    scale = gamma * (var + spec.bn.eps).rsqrt()
    return scale[:, None, None], (beta - mean * scale)[:, None, None]


def normalise(activation, mean, var, gamma, beta, spec, mask, out, workers):
    """Write dropout(batch norm(activation)) into `out`, which may be a view. All are (B, g, H, W)."""
    keep = keep_threshold(spec.drop_rate)[1]
    scale, shift = (values / keep for values in batch_norm_line(gamma, beta, mean, var, spec))

    def scale_and_drop(b, rows):
        result = out[b, :, rows]
        torch.mul(activation[b, :, rows], scale, out=result)
        result += shift
        if mask is not None:
            result *= mask[b, :, rows].to(result.dtype)
    workers.for_bands(scale_and_drop, activation.shape)


def normalise_backward(grad, activation, mean, var, gamma, spec, mask, padding, workers):
    """Backward pass of `normalise` and of the LeakyReLU before it.

    grad: gradient of normalise's output. Returns the gradients of the LeakyReLU's input, gamma and beta. The first has
    `padding` rows and columns of zeros around it: (B, g, H + 2 * padding, W + 2 * padding).
    """
    batch, channels, height, width = activation.shape
    keep = keep_threshold(spec.drop_rate)[1]
    invstd = (var + spec.bn.eps).rsqrt()
    mean, invstd = mean[:, None, None], invstd[:, None, None]
    out = activation.new_empty(batch, channels, height + 2 * padding, width + 2 * padding)
    workers.for_bands(lambda b, rows: out[b, :, rows].zero_(), out.shape)
    inner = out[..., padding:padding + height, padding:padding + width]

    def drop_and_sum(b, rows):
        g = inner[b, :, rows]
        if mask is None:
            g.copy_(grad[b, :, rows])
        else:
            torch.mul(grad[b, :, rows], mask[b, :, rows].to(g.dtype), out=g)
        return g.sum((1, 2), dtype=mean.dtype), ((activation[b, :, rows] - mean) * g).sum((1, 2))
    sums, products = map(sum, zip(*workers.for_bands(drop_and_sum, activation.shape)))
    grad_gamma, grad_beta = products * invstd.flatten() / keep, sums / keep

    scale = gamma[:, None, None] * invstd / keep
    if spec.batch_statistics:
        count = batch * height * width
        slope = -scale * invstd ** 2 * products[:, None, None] / count
        offset = -scale * sums[:, None, None] / count - slope * mean

    def combine(b, rows):
        g, a = inner[b, :, rows], activation[b, :, rows]
        g *= scale
        if spec.batch_statistics:
            g += (a * slope).add_(offset)
        torch.ops.aten.leaky_relu_backward.grad_input(g, a, spec.slope, True, grad_input=g)
    workers.for_bands(combine, activation.shape)
    return out, grad_gamma, grad_beta
