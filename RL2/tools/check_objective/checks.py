"""The checks of an objective: each returns what it saw, or raises `Unsound` with what is wrong and what to change.

Each runs at every setting of the knobs (`Subject.settings`) on a small batch (`subject.synthetic_batch`).
Shape letters: T tokens, B sequences, V vocabulary.
"""

from __future__ import annotations

import inspect
from dataclasses import replace

import torch
from torch import Tensor

from RL2.objectives.objective import Gradient, Objective
from RL2.tools.check_objective.subject import Constants, Subject, SyntheticBatch, extremes, gradient
from RL2.tools.check_objective.two_ranks import Pair
from RL2.tools.checking import Setting, Unsound, check_effects, check_knobs, raises
from RL2.types import MENU, TEACHER_MENU


def _at(subject: Subject, setting: Setting) -> str:
    """Return the start of a reason: the setting, if it is not the given one."""
    changed = subject.named(setting)
    return f"with {changed}: " if changed else ""


def contract(subject: Subject) -> str:
    """Check that it is a pure function (stats, batch, *, knobs) -> (loss_T, {name: metric_T})."""
    _check_signature(subject.function)
    check_knobs(subject)
    whole = subject.whole()
    cases = {
        "": whole,
        "on a fresh rollout, where old_logp_T and ref_logp_T of the batch are None: ": whole.fresh(),
        "on a microbatch without actions (T = 0): ": whole.sequences([2]),
    }
    for setting in subject.settings:
        for case, on in cases.items():
            _call(subject, setting, on, _at(subject, setting) + case)
    return f"tried at {len(subject.settings)} settings of its knobs" if subject.function.knobs else "it has no knobs"


def _check_signature(objective: Objective) -> None:
    """Raise Unsound unless the parameters are (stats, batch, *, knobs)."""
    parameters = list(objective.parameters.values())
    kinds = [p.kind for p in parameters]
    if kinds[:2] != [inspect.Parameter.POSITIONAL_OR_KEYWORD] * 2 or set(kinds[2:]) - {inspect.Parameter.KEYWORD_ONLY}:
        raise Unsound(
            "its parameters must be (stats, batch, *, knobs): knobs come after the star, and there are no others"
        )


def _call(subject: Subject, setting: Setting, on: SyntheticBatch, where: str) -> None:
    leaf_TV, batch = on.logits_TV.requires_grad_(), on.batch
    before = {name: x.clone() for name, x in batch.tensors().items()}
    try:
        out, again = (subject.dense(setting, leaf_TV, on) for _ in range(2))
    except Exception as error:
        raise Unsound(where + raises(subject.function.function, error)) from error
    if not (isinstance(out, tuple) and len(out) == 2 and isinstance(out[0], Tensor) and isinstance(out[1], dict)):
        raise Unsound(f"{where}it must return (loss_T, metrics), a tensor and a dict")
    num_tokens, num_sequences = len(batch.labels_T), batch.num_sequences
    loss_T, metrics = out
    shape = list(loss_T.shape)
    if shape == [num_sequences] and num_sequences != num_tokens:
        raise Unsound(
            f"{where}the loss has one value per sequence, shape [B]: a sequence loss without weights. Give every token "
            "its sequence's value, value_B[batch.sequence_T], so that weight_T can weigh it"
        )
    if not shape or (shape == [1] and num_tokens != 1):
        raise Unsound(
            f"{where}the loss is a single number: it averages by itself. Return one value per token, shape [T]; "
            "the trainer sums loss_T * weight_T, and the weights are the average"
        )
    if shape != [num_tokens]:
        raise Unsound(f"{where}the loss has shape {shape}; it must be [T], here [{num_tokens}]")
    if loss_T.dtype != leaf_TV.dtype:
        raise Unsound(
            f"{where}the loss is {loss_T.dtype} where the statistics are {leaf_TV.dtype}; leave the dtype alone"
        )
    if not loss_T.requires_grad:
        raise Unsound(f"{where}the loss does not depend on any statistic, so nothing would train")
    for name, metric_T in metrics.items():
        if not isinstance(metric_T, Tensor) or list(metric_T.shape) != [num_tokens]:
            raise Unsound(f"{where}the metric {name} must be a tensor with one value per token, shape [T]")
    if not torch.equal(loss_T, again[0]) and loss_T.isfinite().all():
        raise Unsound(f"{where}two calls with the same input give different losses; it must be a pure function")
    if changed := [name for name, x in batch.tensors().items() if not torch.equal(x, before[name])]:
        raise Unsound(f"{where}it changes {', '.join(changed)} of the batch in place; it must be a pure function")


def statistics(subject: Subject) -> str:
    """Check that it reads the statistics that it declares and no others."""
    declared = set(subject.function.needs)
    inside = [name for name in (*MENU, *TEACHER_MENU) if name in declared | subject.read]
    if undeclared := [name for name in inside if name not in declared]:
        line = ", ".join(repr(name) for name in inside)
        raise Unsound(f"it reads {', '.join(undeclared)} without declaring it; write @needs({line})")
    if unread := [name for name in inside if name not in subject.read]:
        raise Unsound(f"it declares {', '.join(unread)} and never reads it; remove it from @needs, it costs time")
    return f"reads {', '.join(inside)}"


def derivative(subject: Subject) -> str:
    """Check that the gradient of autograd is the derivative of the loss, with detached values held constant."""
    whole = subject.whole()
    g = torch.Generator().manual_seed(1)
    weight_T = 0.5 + torch.rand(len(whole.hidden_TD), generator=g, dtype=torch.float64)
    direction_TV = torch.randn(whole.logits_TV.shape, generator=g, dtype=torch.float64)
    for setting in subject.settings:
        for on in (whole, whole.fresh()):
            if wrong := _disagreement(subject, setting, on, weight_T, direction_TV):
                raise Unsound(
                    f"{_at(subject, setting)}{wrong}. Something breaks the graph (.item(), .data, no_grad, rounding) "
                    "or the backward pass of a function of your own is wrong; a constant goes through .detach()"
                )
    return "equals finite differences in float64, with what is detached held constant"


def _disagreement(
    subject: Subject, setting: Setting, on: SyntheticBatch, weight_T: Tensor, direction_TV: Tensor
) -> str:
    """Return where autograd first differs from the central difference, along the label or along `direction_TV`."""
    constants, leaf_TV, step = Constants(), on.logits_TV.requires_grad_(), 1e-5
    with constants:
        loss_T, _ = subject.dense(setting, leaf_TV, on)
    (grad_TV,) = gradient(loss_T, weight_T, leaf_TV)

    @torch.no_grad()
    def moved(by_TV: Tensor) -> Tensor:
        with constants:
            return subject.dense(setting, leaf_TV + by_TV, on)[0]

    along_label_TV = torch.zeros_like(direction_TV).scatter(1, on.batch.labels_T[:, None], 1.0)
    for t in range(len(leaf_TV)):
        for along_TV in (along_label_TV, direction_TV):
            by_TV = torch.zeros_like(along_TV)
            by_TV[t] = along_TV[t] * step
            numeric = ((moved(by_TV) - moved(-by_TV)) * weight_T).sum().item() / (2 * step)
            found = (grad_TV[t] @ along_TV[t]).item()
            if not abs(numeric - found) <= 1e-6 * (1 + abs(found)):
                return f"autograd says {found:.6g} where finite differences of the loss say {numeric:.6g} (token {t})"
    return ""


def closed_form(subject: Subject) -> str:
    """Check that the closed form of the gradient, if there is one, equals autograd."""
    formula = subject.function.gradient
    if formula is None:
        return "none given"
    whole = subject.whole()
    for setting in subject.settings:
        for on in (whole, whole.fresh()):
            _compare(subject, setting, on, formula)
    return "equals autograd in float64"


def _compare(subject: Subject, setting: Setting, on: SyntheticBatch, formula: Gradient) -> None:
    at, leaf_TV = _at(subject, setting), on.logits_TV.requires_grad_()
    p_TV = leaf_TV.detach().softmax(-1)
    loss_T, _ = subject.dense(setting, leaf_TV, on)
    (grad_TV,) = gradient(loss_T, torch.ones_like(loss_T), leaf_TV)
    try:
        taught = [on.teacher_TV.softmax(-1)] if subject.function.needs_teacher else []
        formula_TV = formula(p_TV, *taught, on.batch, **setting)
    except Exception as error:
        raise Unsound(at + raises(formula, error)) from error
    if formula_TV.shape != grad_TV.shape:
        raise Unsound(f"{at}the closed form has shape {list(formula_TV.shape)}; it must be [T, V]")
    error_TV = (formula_TV - grad_TV).abs() / (1 + grad_TV.abs())
    if not error_TV.max() <= 1e-9:
        t, i = divmod(int(error_TV.nan_to_num(torch.inf).argmax()), error_TV.shape[1])
        label = int(on.batch.labels_T[t])
        raise Unsound(
            f"{at}the closed form is {formula_TV[t, i]:.6g} where autograd finds {grad_TV[t, i]:.6g} (the logit of "
            f"{'the sampled' if i == label else 'another'} token, p_a = {p_TV[t, label]:.3g}); one of the two is wrong"
        )


def limits(subject: Subject) -> str:
    """Check that loss and gradient are finite in float32 where tokens are certain, impossible or tied."""
    edge, names = extremes(subject.vocabulary)
    if subject.function.trains_on != "rollout":
        edge = edge.preferences()
    for setting in subject.settings:
        logits_TV = edge.hidden_TD.clone().requires_grad_()
        loss_T, metrics = subject.chunked(setting, logits_TV, edge.head_VD, edge)
        (grad_TV,) = gradient(loss_T, torch.ones_like(loss_T), logits_TV)
        found = {"loss": loss_T, "gradient": grad_TV} | {f"metric {name}": x for name, x in metrics.items()}
        for what, x_T in found.items():
            finite_T = x_T.reshape(len(names), -1).isfinite().all(-1)
            if not finite_T.all():
                where = names[int(finite_T.int().argmin())]
                or_refuse = " (or keep the value out by a range in the annotation)" if _at(subject, setting) else ""
                raise Unsound(
                    f"{_at(subject, setting)}the {what} is not finite in float32 at {where}. For log(1 - p) read "
                    "log1mp, for the mode's max_log1mp, and never divide by 1 - exp(logp); torch.where does not help "
                    f"if the branch not taken is infinite{or_refuse}"
                )
    return "finite in float32 for p from 1e-80 to 1 - 1e-80, and for ties"


def weights(subject: Subject) -> str:
    """Check that tokens and sequences of weight 0 get a gradient of exactly 0."""
    whole = subject.whole()
    odd_T, units = torch.arange(len(whole.logits_TV)) % 2 == 1, whole.units(subject.function.trains_on)
    odd_sequence_T = torch.isin(whole.batch.sequence_T, torch.tensor([b for unit in units[1::2] for b in unit]))
    coupled = False
    for setting in subject.settings:
        at, leaf_TV = _at(subject, setting), whole.logits_TV.requires_grad_()
        loss_T, _ = subject.dense(setting, leaf_TV, whole)
        (of_sequences_TV,) = gradient(loss_T, (~odd_sequence_T).double(), leaf_TV)
        if of_sequences_TV[odd_sequence_T].any():
            raise Unsound(
                f"{at}a sequence of weight 0 gets a gradient, through the losses of other sequences; a loss may only "
                "depend on the statistics of its own sequence, or of its pair if it trains on pairs"
            )
        weighed = replace(whole, batch=whole.batch.with_(weight_T=odd_T.double()))
        if not torch.equal(subject.dense(setting, leaf_TV, weighed)[0], loss_T):
            raise Unsound(f"{at}the loss depends on batch.weight_T; the trainer multiplies by it, so it counts twice")
        (of_tokens_TV,) = gradient(subject.dense(setting, leaf_TV, whole)[0], (~odd_T).double(), leaf_TV)
        coupled |= bool(of_tokens_TV[odd_T].any())
        single = whole.single()
        hidden_TD, head_VD = single.hidden_TD.requires_grad_(), single.head_VD.requires_grad_()
        loss_T, _ = subject.chunked(setting, hidden_TD, head_VD, single)
        nothing_T = torch.zeros_like(loss_T)
        if (loss_T * nothing_T).sum() != 0 or any(x.any() for x in gradient(loss_T, nothing_T, hidden_TD, head_VD)):
            raise Unsound(f"{at}a batch in which every weight is 0 has a loss or a gradient that is not 0")
    if coupled:
        return "sequences of weight 0 get no gradient; tokens do from the others of their sequence, which it couples"
    return "tokens of weight 0 get no gradient"


def invariance(subject: Subject, pair: Pair) -> str:
    """Check that the order of sequences, microbatches and processes have no effect."""
    whole = subject.whole()
    units = whole.units(subject.function.trains_on)
    cuts = {
        "after the sequences changed places": [[b for unit in units for b in unit][::-1]],
        "when its sequence is cut off into another microbatch": [
            [b for unit in units[start::3] for b in unit] for start in (2, 1, 0)
        ],
        "when its sequence is alone": units,
    }
    for setting in subject.settings:
        expected = _per_token(subject, setting, whole)
        for how, parts in cuts.items():
            place_T = whole.batch.with_(token_ids_T=torch.arange(len(whole.hidden_TD)))
            for ids in parts:
                own_T = place_T.sequences(ids).token_ids_T
                for what, x_T in _per_token(subject, setting, whole.sequences(ids)).items():
                    difference_T = (x_T - expected[what][own_T]).abs().flatten(1).amax(1)
                    if not (difference_T <= 1e-9 * (1 + expected[what].abs().max())).all():
                        t = int(difference_T.argmax())
                        detail = f": {expected[what][own_T][t].item():.6g} before, {x_T[t].item():.6g} then" * (
                            what == "loss"
                        )
                        raise Unsound(
                            f"{_at(subject, setting)}the {what} of a token is another one {how}{detail}. It depends "
                            "on the rest of the batch: remove every mean, count or normalisation over the batch "
                            "(weight_T is the average, and knows the whole minibatch; advantages are normalised before)"
                        )
    for setting, together in zip(subject.settings, pair.sums(subject), strict=True):
        for what, alone in subject.sums(setting, whole).items():
            if not (together[what] - alone).norm() <= 1e-9 * (1 + alone.norm()):
                raise Unsound(
                    f"{_at(subject, setting)}two processes, each with some of the sequences, together have another "
                    f"sum of the {what} than one process; the objective must not know about processes"
                )
    return "the same in any order, in any microbatches, and in two processes"


def _per_token(subject: Subject, setting: Setting, on: SyntheticBatch) -> dict[str, Tensor]:
    """Return loss, gradient and metrics, each [T, ...]."""
    leaf_TV = on.logits_TV.requires_grad_()
    loss_T, metrics = subject.dense(setting, leaf_TV, on)
    (grad_TV,) = gradient(loss_T, torch.ones_like(loss_T), leaf_TV)
    metrics = {f"metric {name}": x_T.double()[:, None] for name, x_T in metrics.items()}
    return {name: x.detach() for name, x in ({"loss": loss_T[:, None], "gradient": grad_TV} | metrics).items()}


def effects(subject: Subject) -> str:
    """Check that every knob changes loss, gradient or metrics."""
    whole = subject.whole()

    def differ(a: Setting, b: Setting) -> bool:
        x, y = _per_token(subject, a, whole), _per_token(subject, b, whole)
        return any(not torch.allclose(x[name], y[name], rtol=1e-9, atol=1e-12) for name in x)

    return check_effects(subject, differ)
