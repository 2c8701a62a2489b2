"""varCE, the paper's spatially constrained loss (section 2.2): weighted cross entropy + alpha * variance term."""
import numpy as np
import torch
from scipy import ndimage
from torch import nn
from torch.nn import functional as F

EIGHT_CONNECTED = np.ones((3, 3), dtype=bool)


def label_instances(target):
    """Number the instances of each image: the 8-connected components of `target == 1`.

    target: (B, H, W) int tensor of classes. Returns (B, H, W) int32 on the same device, 0 = no instance.
    """
    inside = (target == 1).cpu().numpy()
    labels = np.stack([ndimage.label(image, EIGHT_CONNECTED)[0] for image in inside])
    return torch.from_numpy(labels.astype(np.int32)).to(target.device)


def weighted_cross_entropy(logits, target, weight):
    """Mean of weight * cross entropy over all B * H * W pixels (paper, section 2.2). Returns a scalar tensor.

    logits: (B, C, H, W) float; target: (B, H, W) int64 classes; weight: (B, H, W) float, 1 to 11, and 0 in what the
    augmentation filled.
    """
    return (F.cross_entropy(logits, target, reduction='none') * weight).mean()


class LossVariance(nn.Module):
    """The variance term (paper, section 2.2): all pixels of an instance should get the same probabilities.

        L_var = 1/B * sum_b 1/(N_b + 1e-8) * sum_{i=1..N_b} sum_c Var(p_c over the pixels of instance i)

    As in the published code, an instance is a component of class 1 (`label_instances`), without its contour, and the
    variance is the unbiased one (|S_i| - 1 in the denominator). An instance of one pixel counts in N_b but adds
    nothing.
    """

    def forward(self, prob_maps, instances):
        """prob_maps: (B, C, H, W) probabilities in [0, 1]; instances: (B, H, W) int ids, 0 = none, gaps allowed.

        Returns a scalar tensor, zero (and differentiable) where there is no instance of two or more pixels.
        """
        # Sorting the pixels by id puts those of an instance side by side, after the background. No shape depends on the
        # number of instances, so that the CPU need not wait for the GPU.
        ids, order = instances.flatten(1).sort(dim=1)                                               # (B, P)
        is_first = F.pad(ids[:, 1:] != ids[:, :-1], (1, 0), value=True) & (ids > 0)
        owner = is_first.cumsum(1)                              # (B, P), 0 = background, else 1 ... N_b
        n_instances = owner[:, -1].to(prob_maps.dtype)          # (B,)

        B, C, P = prob_maps.flatten(2).shape
        owner = owner[:, None].expand(B, C, P)
        probs = prob_maps.flatten(2).gather(2, order[:, None].expand(B, C, P))                      # (B, C, P)
        zeros = probs.new_zeros(B, C, P + 1)                    # at most P instances, and the background
        sizes = zeros[:, :1].scatter_add(2, owner[:, :1], torch.ones_like(probs[:, :1]))            # (B, 1, P + 1)
        means = zeros.scatter_add(2, owner, probs) / sizes.clamp(min=1)
        squares = (probs - means.gather(2, owner)) ** 2                                             # (B, C, P)
        variances = zeros.scatter_add(2, owner, squares) / (sizes - 1).clamp(min=1)
        per_image = variances[:, :, 1:].sum((1, 2))                                                 # (B,)
        return (per_image / (n_instances + 1e-8)).mean()


class VarCELoss(nn.Module):
    """varCE = weighted cross entropy + alpha * variance term (paper, equation 3).

    alpha: weight of the variance term, >= 0. With alpha 0 the term is not computed, and -1 is returned for it.
    """

    def __init__(self, alpha=1.0):
        super().__init__()
        self.alpha = alpha
        self.variance = LossVariance()

    def forward(self, logits, target, weight, instances=None):
        """Returns the scalar tensors (loss, cross entropy, variance term).

        logits: (B, 3, H, W) float; target: (B, H, W) int64 classes; weight: (B, H, W) float; instances: (B, H, W) int,
        by default `label_instances(target)`.
        """
        loss_ce = weighted_cross_entropy(logits, target, weight)
        if self.alpha == 0:
            return loss_ce, loss_ce, logits.new_tensor(-1.0)
        instances = label_instances(target) if instances is None else instances
        loss_var = self.variance(F.softmax(logits, dim=1), instances)
        return loss_ce + self.alpha * loss_var, loss_ce, loss_var
