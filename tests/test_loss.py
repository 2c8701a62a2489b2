"""varCE against the golden numbers and against the published way to compute it: loops over images and instances."""
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy import ndimage

from FullNet import FullNet
from loss import LossVariance, VarCELoss, label_instances, weighted_cross_entropy

GOLDEN = Path(__file__).parent / 'golden'


def loop_variance(prob_maps, instances):
    """The variance term, an instance at a time."""
    total = 0
    for probs, labels in zip(prob_maps, instances):
        ids = [i for i in torch.unique(labels).tolist() if i != 0]
        image = 0
        for i in ids:
            pixels = probs[:, labels == i]
            if pixels.shape[1] > 1:
                image = image + pixels.var(dim=1).sum()
        total = total + image / (len(ids) + 1e-8)
    return total / len(prob_maps)


@pytest.mark.parametrize('i', range(4))
def test_variance_term_is_the_golden_one(i):
    golden = np.load(GOLDEN / 'loss_variance.npz')
    logits = torch.from_numpy(golden[f'{i}/logits']).requires_grad_()
    loss = LossVariance()(logits.softmax(1), torch.from_numpy(golden[f'{i}/instances']))
    loss.backward()
    assert loss.item() == pytest.approx(float(golden[f'{i}/loss']), abs=1e-6)
    assert np.abs(logits.grad.numpy() - golden[f'{i}/grad_logits']).max() < 1e-7


@pytest.mark.parametrize('seed', range(5))
def test_variance_term_equals_the_loop_whatever_the_ids(seed):
    rng = np.random.default_rng(seed)
    labels = np.stack([ndimage.label(rng.random((30, 40)) < 0.4)[0] for _ in range(3)])
    ids = rng.permutation(100_000)[:labels.max() + 1]         # gaps, no order
    ids[0] = 0
    labels = torch.from_numpy(ids[labels])
    labels[1] = 0                                             # an image without instances
    logits = torch.randn(3, 3, 30, 40, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    fast, slow = logits.clone().requires_grad_(), logits.clone().requires_grad_()
    fast_loss, slow_loss = LossVariance()(fast.softmax(1), labels), loop_variance(slow.softmax(1), labels)
    fast_loss.backward()
    slow_loss.backward()
    assert fast_loss.item() == pytest.approx(slow_loss.item(), rel=1e-12)
    torch.testing.assert_close(fast.grad, slow.grad, rtol=1e-9, atol=1e-15)


def test_variance_of_a_two_pixel_instance_by_hand():
    probs = torch.tensor([[[[0.2, 0.6]], [[0.5, 0.3]], [[0.3, 0.1]]]])       # (1, 3, 1, 2)
    # unbiased variances: 0.4^2 / 2, 0.2^2 / 2, 0.2^2 / 2
    assert LossVariance()(probs, torch.ones(1, 1, 2).long()).item() == pytest.approx(0.12, abs=1e-6)


@pytest.mark.parametrize('instances', [torch.zeros(2, 5, 5).long(),                      # none
                                       torch.eye(5).long().mul(torch.arange(1, 6)).repeat(2, 1, 1)],  # single pixels
                         ids=['none', 'single pixels'])
def test_nothing_to_vary_gives_zero_that_backpropagates(instances):
    logits = torch.randn(2, 3, 5, 5, requires_grad=True)
    loss = LossVariance()(logits.softmax(1), instances)
    loss.backward()
    assert loss.item() == 0 and (logits.grad == 0).all()


def test_instances_are_the_8_connected_components_of_class_1():
    target = torch.tensor([[[1, 0, 1, 2], [0, 1, 0, 2], [0, 0, 2, 0], [0, 0, 2, 1]]])
    assert label_instances(target).tolist() == [[[1, 0, 1, 0], [0, 1, 0, 0], [0, 0, 0, 0], [0, 0, 0, 2]]]


def test_cross_entropy_is_weighted_and_divided_by_all_pixels():
    logits = torch.randn(2, 3, 4, 5)
    target = torch.randint(0, 3, (2, 4, 5))
    weight = torch.rand(2, 4, 5) * 10 + 1
    expected = sum(-logits[b, :, y, x].log_softmax(0)[target[b, y, x]] * weight[b, y, x]
                   for b in range(2) for y in range(4) for x in range(5)) / 40
    assert weighted_cross_entropy(logits, target, weight).item() == pytest.approx(expected.item(), rel=1e-5)


def test_alpha_zero_leaves_the_variance_term_out_and_reports_minus_one():
    logits, target = torch.randn(1, 3, 6, 6), torch.ones(1, 6, 6).long()
    loss, loss_ce, loss_var = VarCELoss(alpha=0)(logits, target, torch.ones(1, 6, 6))
    assert loss == loss_ce and loss_var == -1
    loss, loss_ce, loss_var = VarCELoss(alpha=2.5)(logits, target, torch.ones(1, 6, 6))
    assert loss.item() == pytest.approx((loss_ce + 2.5 * loss_var).item()) and loss_var > 0


def test_training_step_is_the_golden_one(device='cpu'):
    golden = np.load(GOLDEN / 'train_step.npz')
    model = FullNet(3, 3, n_layers=4, growth_rate=6, drop_rate=0.0)
    model.load_state_dict({k[3:]: torch.from_numpy(golden[k]) for k in golden if k.startswith('sd/')})
    model.to(device)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3, betas=(0.9, 0.99), weight_decay=1e-4)
    target = torch.from_numpy(golden['target'])
    assert (label_instances(target).numpy() == golden['instances']).all()
    input, target, weight = (values.to(device) for values in (torch.from_numpy(golden['input']), target,
                                                              torch.from_numpy(golden['weight'])))
    loss, loss_ce, loss_var = VarCELoss(1.0)(model(input), target, weight)
    for value, name in ((loss, 'loss'), (loss_ce, 'loss_ce'), (loss_var, 'loss_var')):
        assert value.item() == pytest.approx(float(golden[name]), rel=1e-5)
    loss.backward()
    # one input of a ReLU is so near 0 that its sign depends on the order of sums: float64 differs by 1.6 %, CUDA too
    tolerance = 1e-2 if device == 'cpu' else 3e-2
    for weight, name in ((model.conv1.conv.weight, 'grad_conv1'), (model.conv2.weight, 'grad_last'),
                         (model.blocks.block5.denselayer4.conv.conv.weight, 'grad_block5_layer4')):
        assert np.abs(weight.grad.cpu().numpy() - golden[name]).max() < tolerance * np.abs(golden[name]).max()
    optimizer.step()
    assert np.abs(model.conv2.weight.detach().cpu().numpy() - golden['conv2_after_adam']).max() < 1e-4
