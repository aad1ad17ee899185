"""Define the config of a mixture of experts; separate from `layers/moe.py`, without jax."""

import dataclasses
from dataclasses import field
from typing import Literal, get_args

from hcp_jax.base.settings import MOST, check, fixed, fixed_later, free, numbers
from hcp_jax.kernels.tiles import Product

Router = Literal["softmax", "sigmoid"]


@dataclasses.dataclass(frozen=True)
class MoEConfig:
    """Mixture of experts in place of the MLP; names as in Hugging Face's configs.

    No token is dropped, whatever its experts. Padding is not routed.

    Attributes:
        num_experts: E.
        num_experts_per_tok: k, experts of each token.
        moe_intermediate_size: F, of each expert.
        router: what scores experts: the "softmax" of all logits, or each logit's "sigmoid".
        norm_topk_prob: divide the scores of a token's experts by their sum.
        routed_scaling_factor: factor of these weights.
        n_group: experts are in this many equal groups (DeepSeek-V3; sigmoid only).
        topk_group: a token's experts are from this many of the groups.
        score_correction: add a bias to the scores that choose the experts, not to their weights
            (DeepSeek-V3's balancing without an auxiliary loss). Each step changes it by
            `optimizer.score_correction_rate` towards equal load.
        bias: a bias on the router and on each product of the experts (gpt-oss).
        shared_expert_intermediate_size: width of an MLP that all tokens go through, too; 0 for
            none.
        shared_expert_gate: multiply its output by a learnt sigmoid per token (Qwen2-MoE).
        router_aux_loss_coef: weight of each layer's load-balance loss (Fedus et al., Switch
            Transformers, 2021), over all tokens of a microbatch.
        sequence_aux_loss_coef: weight of each layer's load-balance loss of every document by itself
            (DeepSeek-V3), which counts by its tokens; 0 for none.
        router_z_loss_coef: weight of the squared log-partition of each layer's router (Zoph et
            al., ST-MoE, 2022).
        first_k_dense_replace: the first layers, as many as this, have an MLP.
        decoder_sparse_step: of the other layers, those whose number (from 1) is a multiple of this
            have experts.
        product: what multiplies rows with the weights of their experts, as in
            `hcp_jax.kernels.expert_product`; None for "triton" on GPUs
            where its kernels have passed their check (`hcp verify --kernels`), else "ragged_dot".
        dispatch_parts: with `parallel.ep`, rows travel in this many parts, so that one part
            travels while experts compute another; docs/moe.md says when 2 is better than 1.

    Raises:
        ValueError: if sizes do not fit each other.
        NotImplementedError: for groups of experts that a softmax scores.
    """

    num_experts: int = field(metadata=fixed(above=0, most=65536))
    num_experts_per_tok: int = field(metadata=numbers(above=0, most=1024))
    moe_intermediate_size: int = field(metadata=fixed(above=0, most=MOST))
    router: Router = field(default="softmax", metadata=numbers())
    norm_topk_prob: bool = field(default=True, metadata=numbers())
    routed_scaling_factor: float = field(default=1.0, metadata=numbers(above=0, most=1e6))
    n_group: int = field(default=1, metadata=numbers(above=0, most=65536))
    topk_group: int = field(default=1, metadata=numbers(above=0, most=65536))
    score_correction: bool = field(default=False, metadata=fixed())
    shared_expert_intermediate_size: int = field(default=0, metadata=fixed(least=0, most=MOST))
    shared_expert_gate: bool = field(default=False, metadata=fixed())
    bias: bool = field(default=False, metadata=fixed_later())
    router_aux_loss_coef: float = field(default=1e-3, metadata=numbers(least=0, most=1e6))
    sequence_aux_loss_coef: float = field(default=0.0, metadata=numbers(least=0, most=1e6))
    router_z_loss_coef: float = field(default=0.0, metadata=numbers(least=0, most=1e6))
    first_k_dense_replace: int = field(default=0, metadata=fixed(least=0, most=100_000))
    decoder_sparse_step: int = field(default=1, metadata=fixed(least=1, most=100_000))
    product: Product | None = field(default=None, metadata=free())
    dispatch_parts: int = field(default=1, metadata=free(least=1, most=16))

    def __post_init__(self) -> None:
        check(self, "model.moe.")
        for name, allowed in (("router", Router), ("product", Product)):
            value = getattr(self, name)
            if value not in get_args(allowed) and not (name == "product" and value is None):
                raise ValueError(
                    f"model.moe.{name} must be one of {', '.join(get_args(allowed))}, "
                    f"got {value!r}."
                )
        experts, per_token = self.num_experts, self.num_experts_per_tok
        if experts % self.n_group or self.topk_group > self.n_group:
            raise ValueError(
                f"model.moe: num_experts={experts} must be a multiple of n_group={self.n_group}, "
                f"and topk_group={self.topk_group} at most n_group."
            )
        size = experts // self.n_group
        if self.n_group > 1 and size < 2:
            raise ValueError(
                f"model.moe: n_group={self.n_group} groups of num_experts={experts} have one "
                "expert each; a group needs two, whose scores rank it."
            )
        if per_token > self.topk_group * size:
            raise ValueError(
                f"model.moe: num_experts_per_tok={per_token} is more than the "
                f"{self.topk_group * size} experts that a token can choose from."
            )
        if self.n_group > 1 and self.router == "softmax":
            raise NotImplementedError(
                f"model.moe: n_group={self.n_group} with router 'softmax' is not supported; use "
                "router 'sigmoid', or n_group 1."
            )
        if self.shared_expert_gate and not self.shared_expert_intermediate_size:
            raise ValueError(
                "model.moe: shared_expert_gate needs a shared expert: give "
                "shared_expert_intermediate_size."
            )

    def has_experts(self, layer: int) -> bool:
        """Return whether a layer, counted from 0, has experts."""
        past = layer >= self.first_k_dense_replace
        return past and (layer + 1) % self.decoder_sparse_step == 0
