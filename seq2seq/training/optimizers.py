"""Optimizers over float32 parameters."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor, nn

from seq2seq.config.schema import OptimizerConfig, settled
from seq2seq.training.distributed import SINGLE_PROCESS
from seq2seq.utils.errors import UserError

ParamGroup = dict[str, Any]


class Optimizers:
    """One or several optimizers over disjoint parameters, used as one."""

    def __init__(self, optimizers: list[torch.optim.Optimizer]) -> None:
        self.optimizers = optimizers

    @property
    def groups(self) -> list[ParamGroup]:
        return [group for optimizer in self.optimizers for group in optimizer.param_groups]

    def step(self, lr: float) -> None:
        """Update at a learning rate, multiplied by a factor for each kind of parameter."""
        for group in self.groups:
            group["lr"] = lr * group["multiple"]
        for optimizer in self.optimizers:
            optimizer.step()

    def state_dict(self, whole: Callable[[Tensor], Tensor] = SINGLE_PROCESS.whole) -> list[dict[str, Any]]:
        """Return the state of each optimizer, with whole moments."""
        states = [optimizer.state_dict() for optimizer in self.optimizers]
        for state in states:
            state["state"] = {
                i: {name: whole(x) if isinstance(x, Tensor) else x for name, x in moments.items()}
                for i, moments in state["state"].items()
            }
        return states

    def load_state_dict(
        self, states: list[dict[str, Any]], part_like: Callable[[Tensor, Tensor], Tensor] = SINGLE_PROCESS.part_like
    ) -> None:
        """Restore moments; learning rates, decay and the like follow the current config."""
        for optimizer, state in zip(self.optimizers, states, strict=True):
            configured = [{k: v for k, v in group.items() if k != "params"} for group in optimizer.param_groups]
            parameters = [p for group in optimizer.param_groups for p in group["params"]]
            own = {
                i: {name: part_like(x, parameters[i]) if isinstance(x, Tensor) else x for name, x in moments.items()}
                for i, moments in state["state"].items()
            }
            optimizer.load_state_dict({**state, "state": own})
            for group, values in zip(optimizer.param_groups, configured, strict=True):
                group.update(values)

    def keep(self, parameters: Iterable[nn.Parameter]) -> None:
        """Forget the moments of all other parameters."""
        kept = set(parameters)
        for optimizer in self.optimizers:
            for p in optimizer.state.keys() - kept:
                del optimizer.state[p]

    def clear(self) -> None:
        """Forget all moments."""
        for optimizer in self.optimizers:
            optimizer.state.clear()


def build_optimizer(model: nn.Module, config: OptimizerConfig) -> Optimizers:
    """Build the optimizer, with trained parameters grouped by kind."""
    members, lr = parameters_by_kind(model), settled(config.lr)
    groups = {
        kind: {
            "params": members[kind],
            "kind": kind,
            "multiple": group["lr_scale"],
            "weight_decay": group["weight_decay"],
        }
        for kind, group in asdict(config.param_groups).items()
        if members[kind]
    }
    beta1, beta2 = config.betas

    def adamw(param_groups: Iterable[ParamGroup]) -> torch.optim.Optimizer:
        return torch.optim.AdamW(list(param_groups), lr=lr, betas=(beta1, beta2), eps=config.eps, fused=True)

    if config.name == "muon":
        if not hasattr(torch.optim, "Muon"):
            raise UserError(
                f"optimizer: muon needs torch 2.9, found {torch.__version__}; choose optimizer=adamw", code=2
            )
        matrices = [p for p in members["matrices"] if p.dim() == 2]
        tensors = [p for p in members["matrices"] if p.dim() != 2]  # stacks of matrices and convolutions
        others = [group for kind, group in groups.items() if kind != "matrices"]
        others += [{**groups["matrices"], "params": tensors}] if tensors else []
        muon = torch.optim.Muon(
            [{**groups["matrices"], "params": matrices}], lr=lr, momentum=0.95, adjust_lr_fn="match_rms_adamw"
        )
        return Optimizers([muon, adamw(others)])
    if config.name == "schedule_free":
        return Optimizers([ScheduleFree(groups.values(), (beta1, beta2), config.eps)])
    if config.name == "adafactor":
        # On a GPU it waits for two norms of each parameter; so does torch's foreach form.
        return Optimizers([torch.optim.Adafactor(list(groups.values()), lr=lr)])
    return Optimizers([adamw(groups.values())])


def parameters_by_kind(model: nn.Module) -> dict[str, list[nn.Parameter]]:
    """Group parameters into embedding tables, matrices, and vectors: gains and biases, which need no decay."""
    tables = {id(p) for module in model.modules() if isinstance(module, nn.Embedding) for p in module.parameters()}
    members: dict[str, list[nn.Parameter]] = {"embeddings": [], "matrices": [], "vectors": []}
    for parameter in model.parameters():
        if parameter.requires_grad:
            kind = "embeddings" if id(parameter) in tables else "matrices" if parameter.dim() >= 2 else "vectors"
            members[kind].append(parameter)
    return members


def optimizer_table(optimizers: Optimizers, config: OptimizerConfig) -> list[tuple[str, str]]:
    """Describe each group of parameters and how it is trained."""
    return [
        (
            group["kind"],
            f"{sum(p.numel() for p in group['params']):>12,}  {type(optimizer).__name__}, "
            f"lr {settled(config.lr) * group['multiple']:.2g}, decay {group['weight_decay']:g}",
        )
        for optimizer in optimizers.optimizers
        for group in optimizer.param_groups
    ]


class ScheduleFree(torch.optim.Optimizer):
    """Schedule-free AdamW (Defazio et al. 2024, algorithm 1).

    The parameters are y, where gradients are taken; z takes the steps, and x averages z weighted by squared learning
    rates. Since y = (1 − β₁) z + β₁ x, only z is stored.
    """

    def __init__(self, groups: Iterable[ParamGroup], betas: tuple[float, float], epsilon: float) -> None:
        super().__init__(groups, {"lr": 0.0, "betas": betas, "eps": epsilon, "weight_decay": 0.0})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            beta1, beta2 = group["betas"]
            ys = [p for p in group["params"] if p.grad is not None]
            gradients = [p.grad for p in ys if p.grad is not None]
            if not ys:  # another process updates this group
                continue
            for p in ys:
                if not self.state[p]:
                    self.state[p] = {"z": p.clone(), "square": torch.zeros_like(p), "step": 0, "weight": 0.0}
                self.state[p]["step"] += 1
                self.state[p]["weight"] += group["lr"] ** 2
            zs, squares = [self.state[p]["z"] for p in ys], [self.state[p]["square"] for p in ys]
            step = self.state[ys[0]]["step"]
            fraction = group["lr"] ** 2 / max(self.state[ys[0]]["weight"], 1e-30)
            torch._foreach_mul_(squares, beta2)
            torch._foreach_addcmul_(squares, gradients, gradients, 1 - beta2)
            denominators = torch._foreach_sqrt(torch._foreach_div(squares, 1 - beta2**step))
            torch._foreach_add_(denominators, group["eps"])
            directions = torch._foreach_div(gradients, denominators)
            torch._foreach_add_(directions, ys, alpha=group["weight_decay"])
            # x' = (1 − c) x + c z' and y' = (1 − β₁) z' + β₁ x', written in y and z alone, with c = `fraction`.
            torch._foreach_lerp_(ys, zs, fraction)
            torch._foreach_add_(ys, directions, alpha=group["lr"] * (beta1 * (1 - fraction) - 1))
            torch._foreach_add_(zs, directions, alpha=-group["lr"])

    @torch.no_grad()
    def average(self, y: Tensor) -> Tensor:
        """Return x of a parameter, the weights to translate with."""
        beta1 = self.param_groups[0]["betas"][0]
        z = self.state[y].get("z", y)
        return z + (y - z) / beta1


def clip_gradients(
    gradients: list[Tensor], max_norm: float, all_norms: Callable[[Sequence[Tensor]], Tensor] = SINGLE_PROCESS.all_norms
) -> Tensor:
    """Scale all gradients so that their common norm is at most `max_norm` (0: no limit) → the norm before.

    `all_norms` adds the norms of the gradients that other processes hold.
    """
    # By hand, as torch's clip_grads_with_norm_ adds 1e-6 to the norm, which would change every clipped update.
    norm = torch.linalg.vector_norm(all_norms(torch._foreach_norm(gradients) if gradients else ()))
    if max_norm and gradients:
        torch._foreach_mul_(gradients, (max_norm / norm).clamp(max=1.0))
    return norm
