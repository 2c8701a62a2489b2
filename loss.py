"""varCE, the paper's spatially constrained loss (section 2.2): weighted cross entropy + alpha * variance term."""
import numpy as np
import torch
from scipy import ndimage
from torch import nn
from torch.nn import functional as F

EIGHT_CONNECTED = np.ones((3, 3), dtype=bool)


def label_instances(target):
    """Instances of each image: 8-connected components of `target == 1`.

    target: (B, H, W) int tensor of classes. Returns (B, H, W) int64 on the same device, 0 = no instance.
    """
    inside = (target == 1).cpu().numpy()
    labels = np.stack([ndimage.label(image, EIGHT_CONNECTED)[0] for image in inside])
    return torch.from_numpy(labels.astype(np.int64)).to(target.device)


def weighted_cross_entropy(logits, target, weight):
    """Mean over all B * H * W pixels of weight * cross entropy.

    logits: (B, C, H, W) float; target: (B, H, W) int64 classes; weight: (B, H, W) float, 1 to 11.
    """
    return (F.cross_entropy(logits, target, reduction='none') * weight).mean()


class LossVariance(nn.Module):
    """The variance term: pixels of one instance should get the same probabilities.

        L_var = 1/B * sum_b 1/(N_b + 1e-8) * sum_{i=1..N_b} sum_c Var(p_c over the pixels of instance i)

    with the unbiased variance (|S_i| - 1 in the denominator). An instance of one pixel counts in N_b but adds nothing.
    """

    def forward(self, prob_maps, instances):
        """prob_maps: (B, C, H, W) probabilities in [0, 1]; instances: (B, H, W) int ids, 0 = none, gaps allowed.

        Returns a scalar tensor, zero (and differentiable) where there is no instance of two or more pixels.
        """
        batch_size = len(prob_maps)
        image, y, x = torch.nonzero(instances, as_tuple=True)               # (P,) pixels inside an instance
        probs = prob_maps[image, :, y, x]                                   # (P, C)
        # number the instances of the whole batch from 0, whatever their ids
        ids = instances[image, y, x].long()
        stride = ids.max() + 1 if len(ids) else 1
        owner = torch.unique(image * stride + ids, return_inverse=True)[1]  # (P,) instance of each pixel
        n_instances = int(owner.max()) + 1 if len(owner) else 0

        sizes = torch.bincount(owner, minlength=n_instances).to(probs.dtype)[:, None]                   # (I, 1)
        means = probs.new_zeros(n_instances, probs.shape[1]).index_add(0, owner, probs) / sizes         # (I, C)
        squares = (probs - means[owner]) ** 2                                                           # (P, C)
        variances = torch.zeros_like(means).index_add(0, owner, squares) / (sizes - 1).clamp(min=1)     # (I, C)

        image_of = torch.zeros(n_instances, dtype=torch.long, device=probs.device).index_copy(0, owner, image)
        counts = torch.bincount(image_of, minlength=batch_size).to(probs.dtype)                         # (B,)
        per_image = probs.new_zeros(batch_size).index_add(0, image_of, variances.sum(1))
        return (per_image / (counts + 1e-8)).mean()


class VarCELoss(nn.Module):
    """varCE = weighted cross entropy + alpha * variance term (paper, equation 3).

    alpha: weight of the variance term, >= 0; with 0 the term is not computed and is reported as -1.
    """

    def __init__(self, alpha=1.0):
        super().__init__()
        self.alpha = alpha
        self.variance = LossVariance()

    def forward(self, logits, target, weight):
        """logits: (B, 3, H, W); target: (B, H, W) int64; weight: (B, H, W), 1 to 11 -> (loss, CE, variance term)."""
        loss_ce = weighted_cross_entropy(logits, target, weight)
        if self.alpha == 0:
            return loss_ce, loss_ce, logits.new_tensor(-1.0)
        loss_var = self.variance(F.softmax(logits, dim=1), label_instances(target))
        return loss_ce + self.alpha * loss_var, loss_ce, loss_var
