"""The pairs that comparing checkpoints is measured on: what is said of them is true."""

from __future__ import annotations

import itertools
import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

sys.path.append(str(Path(__file__).parents[1] / "benchmarks"))

from pairs import baselines, changes, scores
from pairs.barrier import barrier, line
from pairs.families import FAMILIES, MLP, Hidden
from pairs.kinds import GROUPS
from pairs.manifest import pairs
from pairs.recipes import Made, Source
from pairs.training import samples
from regauge.comparing.features import pair_features, storage_features, tensor_features
from regauge.comparing.kinds import Kind, kind


def build(name: str) -> nn.Module:
    model = FAMILIES[name].build(0, False, False).eval()
    random = torch.Generator().manual_seed(1)
    with torch.no_grad():  # Gains, biases and statistics that are not all alike.
        for value in (*model.parameters(), *model.buffers()):
            if value.dim() == 1 and value.is_floating_point():
                value.add_(0.3 * torch.rand(value.shape, generator=random))
    return model


def some_inputs(name: str) -> torch.Tensor:
    random = torch.Generator().manual_seed(2)
    if FAMILIES[name].task == "digits":
        return torch.randn(4, 1, 8, 8, generator=random)
    return torch.randint(64, (2, 16), generator=random)


def origins(made: Made) -> set[tuple[str, int, str, str]]:
    own = {(made.source.family, made.source.seed, made.source.part, made.source.variant)}
    return own.union(*(origins(value) for _, value in made.steps if isinstance(value, Made)))


def test_the_pairs_are_always_the_same_and_enough():
    found = pairs()
    assert [p.plain() for p in found] == [p.plain() for p in pairs()]
    assert len({p.name for p in found}) == len(found)
    assert sum(p.derived for p in found) >= 40
    assert sum(not p.derived for p in found) >= 60
    assert pairs(["mlp"]) == tuple(p for p in found if p.family == "mlp")


def test_pairs_are_derived_exactly_where_they_have_an_origin_in_common():
    for pair in pairs():
        assert pair.derived == bool(origins(pair.a) & origins(pair.b)), pair.name


def test_every_disguise_has_a_seed_of_its_own():
    for name in FAMILIES:
        seeds = [
            value
            for pair in pairs([name])
            for made in (pair.a, pair.b)
            for change, value in made.steps
            if change == "disguised"
        ]
        assert len(set(seeds)) == len(seeds)


def test_a_different_making_has_a_different_digest():
    source = Source("mlp", 0)
    made = [
        Made(source),
        Made(Source("mlp", 0, "b")),
        Made(source, (("tuned", 1),)),
        Made(source, (("tuned", 2),)),
        Made(source, (("averaged", Made(Source("mlp", 1))),)),
        Made(source, (("averaged", Made(Source("mlp", 2))),)),
    ]
    assert len({item.digest for item in made}) == len(made)


def test_the_parts_of_the_data_share_nothing():
    a, b = (samples("digits", part) for part in "ab")
    held = samples("digits", "a", held_out=True)
    for one, other in itertools.combinations((a, b, held), 2):
        assert not set(map(bytes, one.x.numpy())) & set(map(bytes, other.x.numpy()))


@pytest.mark.parametrize("name", list(FAMILIES))
def test_silent_neurons_may_as_well_be_taken_out(name: str):
    family, model = FAMILIES[name], build(name)
    silent, smaller = changes.silenced(model, family), changes.removed(model, family)
    x = some_inputs(name)
    with torch.no_grad():
        whole, one, other = (family.logits(m.double(), _double(x)) for m in (model, silent, smaller))
    torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-9)
    assert not torch.allclose(whole, one, rtol=1e-3)
    before = sum(p.numel() for p in model.parameters())
    assert sum(p.numel() for p in smaller.parameters()) < before


@pytest.mark.parametrize("name", list(FAMILIES))
def test_the_first_neurons_of_a_wider_model_fit_the_usual_size(name: str):
    family = FAMILIES[name]
    wide = family.build(3, True, False)
    cut = changes.first(wide, family, family.build(0, False, False))
    assert {n: p.shape for n, p in cut.state_dict().items()} == {
        n: p.shape for n, p in family.build(0, False, False).state_dict().items()
    }
    with torch.no_grad():
        family.logits(cut, some_inputs(name))


def test_the_neurons_that_go_are_the_least_and_do_not_depend_on_their_scale():
    model = MLP(64, nn.ReLU)
    with torch.no_grad():
        model.first.weight[7] *= 1e-3
        model.first.weight[8] *= 1e-3
        model.second.weight[:, 8] *= 1e3
    hidden = Hidden((("first.weight", 0), ("first.bias", 0)), (("second.weight", 1),))
    gone = changes.least(model, hidden, 1 / 64)
    assert gone.tolist() == [7]


def test_rounding_has_sixteen_levels_and_errs_by_half_a_step():
    model = nn.Sequential(nn.Linear(128, 5), nn.Linear(5, 3))
    done = changes.rounded(model)
    groups, theirs = model[0].weight.reshape(-1, 64), done[0].weight.reshape(-1, 64)
    step = (groups.amax(1) - groups.amin(1)) / 15
    assert bool(((groups - theirs).abs().amax(1) <= 0.501 * step).all())
    assert max(len(group.unique()) for group in theirs) <= 16
    assert torch.equal(model[0].bias, done[0].bias)
    assert all(len(row.unique()) <= 16 for row in done[1].weight)


def test_bfloat16_holds_what_was_rounded_to_it():
    model = nn.Linear(9, 5)
    done = changes.half(model)
    assert done.weight.dtype == torch.float32
    assert storage_features([done.weight])["bfloat16"] == 1.0
    assert storage_features([model.weight])["bfloat16"] < 0.2
    torch.testing.assert_close(done.weight, model.weight, rtol=2**-8, atol=0)


def test_an_average_is_half_way():
    one, other = build("cnn"), FAMILIES["cnn"].build(1, False, False)
    mean = changes.averaged(one, other).state_dict()
    for name, value in one.state_dict().items():
        if value.is_floating_point():
            torch.testing.assert_close(mean[name], (value + other.state_dict()[name]) / 2)
    model = MLP(8, nn.ReLU)
    assert barrier(line(FAMILIES["mlp"], model, model)) == pytest.approx(0.0, abs=1e-6)


def test_a_low_rank_summand_has_that_rank_and_leaves_the_rest():
    model = FAMILIES["vit"].build(0, False, False)
    done = changes.in_place(model, changes.adapted(FAMILIES["vit"], 1, steps=3, rank=2))
    theirs, moved = dict(done.named_parameters()), 0
    assert theirs.keys() == dict(model.named_parameters()).keys()
    for name, p in model.named_parameters():
        delta = (theirs[name] - p).detach().double()
        if p.dim() < 2 or name == "positions":
            assert float(delta.abs().max()) == 0.0
        elif float(delta.norm()) > 0:
            moved += 1
            assert float(torch.linalg.svdvals(delta)[2]) < 1e-5
            assert tensor_features(p, theirs[name])["rank"] <= 2 / min(p.flatten(1).shape)
    assert moved >= 12
    assert all(p.requires_grad for p in done.parameters())


def test_training_on_moves_all_and_repeats_itself():
    family = FAMILIES["mlp"]
    model = family.build(0, False, False)
    one, two = (changes.in_place(model, changes.tuned(family, 1, steps=3)) for _ in range(2))
    for name, p in model.named_parameters():
        assert torch.equal(one.get_parameter(name), two.get_parameter(name))
        assert not torch.equal(one.get_parameter(name), p)


def test_area_under_the_curve_is_the_share_of_pairs_in_order():
    rng = np.random.default_rng(0)
    yes, no = rng.integers(0, 8, 30).tolist(), rng.integers(-3, 6, 40).tolist()
    share = np.mean([(y > n) + 0.5 * (y == n) for y in yes for n in no])
    assert scores.auc(yes, no) == pytest.approx(share)
    curve = scores.roc(yes, no)
    trapezia = np.trapezoid([0, *(t for *_, t in curve)], [0, *(f for _, f, _ in curve)])
    assert trapezia == pytest.approx(share)


def test_thresholds_count_what_they_say():
    yes, no = [0.9, 0.8, 0.3], [0.5, 0.1, 0.0]
    found = scores.without_false(yes, no)
    assert (found.found, found.missed, found.false, found.rejected) == (2, 1, 0, 3)
    assert 0.5 < found.threshold < 0.8
    assert scores.best(yes, no) == found
    assert scores.without_false([0.1], [0.2]).found == 0
    json.dumps(scores.judged({"copy": [0.1]}, [0.2]))


def test_a_fitted_threshold_has_the_rate_it_states():
    random = np.random.default_rng(1)
    found = scores.threshold(np.tanh(random.normal(0.4, 0.2, 4000)).tolist())
    laws, exact = found["at false-positive rate"], np.tanh(0.4 + 2.326 * 0.2)
    assert laws["normal"]["0.01"] == pytest.approx(exact, abs=0.01)
    assert laws["gumbel"]["0.001"] > laws["normal"]["0.001"] > laws["normal"]["0.01"]
    assert found["rule of three"] == 3 / 4000


def test_baselines_are_one_for_a_model_and_itself():
    for name in ("mlp", "cnn"):
        model = build(name)
        for way in baselines.BASELINES.values():
            assert way(FAMILIES[name], model, model, some_inputs(name)) == pytest.approx(1.0)


def test_baselines_see_what_they_are_said_to_see():
    model, other = MLP(16, nn.ReLU), MLP(16, nn.ReLU)
    order = torch.randperm(16, generator=torch.Generator().manual_seed(0))
    other.load_state_dict(model.state_dict())
    with torch.no_grad():
        other.first.weight.copy_(model.first.weight[order])
        other.first.bias.copy_(model.first.bias[order])
        other.second.weight.copy_(model.second.weight[:, order])
    x = torch.randn(32, 1, 8, 8, generator=torch.Generator().manual_seed(1))
    family = FAMILIES["mlp"]
    torch.testing.assert_close(model(x), other(x))
    assert baselines.cosine(model, other) < 0.9
    assert baselines.singular_values(model, other) == pytest.approx(1.0, abs=1e-5)
    assert baselines.cka(family, model, other, x) == pytest.approx(1.0, abs=1e-5)
    assert baselines.cka(family, model, MLP(16, nn.ReLU), x) < 0.99


def test_features_of_differences_that_are_known():
    random = torch.Generator().manual_seed(0)
    a = torch.randn(200, 300, generator=random, dtype=torch.float64)
    uniform = tensor_features(a, a + torch.rand(a.shape, generator=random, dtype=a.dtype) - 0.5)
    assert uniform["kurtosis"] == pytest.approx(1.8, abs=0.05)
    assert uniform["noise"] < 0.02
    assert uniform["flatness"] > 0.9
    half = tensor_features(a, 0.5 * a)
    assert half["slope"] == pytest.approx(0.5)
    assert half["noise"] == pytest.approx(1.0)
    assert half["residual"] == pytest.approx(0.5)
    b = a.clone()
    b[:20] = 0
    zeroed = tensor_features(a, b)
    assert zeroed["zero rows"] == pytest.approx(0.1)
    assert zeroed["same rows"] == pytest.approx(0.9)


def _changed() -> dict[str, nn.Module]:
    family, random = FAMILIES["mlp"], torch.Generator().manual_seed(3)
    model = family.build(0, False, False)

    def shaken(model: nn.Module) -> None:
        for p in model.parameters():
            p.data.add_(0.05 * p.data.norm() / p.numel() ** 0.5 * torch.randn(p.shape, generator=random))

    return {
        "base": model,
        Kind.COPY: model,
        Kind.BFLOAT16: changes.half(model),
        Kind.QUANTISED: changes.rounded(model),
        Kind.ZEROED: changes.silenced(model, family),
        Kind.RESIZED: changes.removed(model, family),
        Kind.TRAINED: changes.in_place(model, shaken),
        Kind.LOW_RANK: changes.in_place(model, changes.adapted(family, 1, steps=20)),
        Kind.AVERAGED: changes.averaged(model, family.build(1, False, False)),
    }


def test_rules_name_the_change():
    found = _changed()
    base = found.pop("base")
    assert found.keys() == GROUPS.keys()
    for name, model in found.items():
        both = [(p, q) for p, q in baselines.common(base, model) if p.dim() > 1]
        stored = [p for p in model.parameters() if p.dim() > 1]
        assert kind(pair_features(both, stored)) == name


def _double(x: torch.Tensor) -> torch.Tensor:
    return x.double() if x.is_floating_point() else x
