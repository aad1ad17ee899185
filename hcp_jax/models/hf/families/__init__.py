"""List the supported families of Hugging Face models, one module for each or for close relatives.

To add a family, write its module beside this file and list it here.
"""

from hcp_jax.models.config import ModelConfig
from hcp_jax.models.hf.families.bamba import BAMBA
from hcp_jax.models.hf.families.family import Family
from hcp_jax.models.hf.families.gemma3 import GEMMA3_TEXT
from hcp_jax.models.hf.families.glm4_moe import GLM4_MOE
from hcp_jax.models.hf.families.gpt_oss import GPT_OSS
from hcp_jax.models.hf.families.llama import LLAMA, MISTRAL
from hcp_jax.models.hf.families.minimax_m2 import MINIMAX_M2
from hcp_jax.models.hf.families.mixtral import MIXTRAL
from hcp_jax.models.hf.families.olmo2 import OLMO2
from hcp_jax.models.hf.families.phi3 import PHI3
from hcp_jax.models.hf.families.qwen import QWEN2, QWEN3, QWEN3_MOE
from hcp_jax.models.hf.families.qwen3_next import QWEN3_NEXT
from hcp_jax.models.hf.families.smollm3 import SMOLLM3

FAMILIES: dict[str, Family] = {
    "llama": LLAMA,
    "mistral": MISTRAL,
    "phi3": PHI3,
    "qwen2": QWEN2,
    "qwen3": QWEN3,
    "smollm3": SMOLLM3,
    "olmo2": OLMO2,
    "gemma3_text": GEMMA3_TEXT,
    "mixtral": MIXTRAL,
    "qwen3_moe": QWEN3_MOE,
    "glm4_moe": GLM4_MOE,
    "minimax_m2": MINIMAX_M2,
    "gpt_oss": GPT_OSS,
    "bamba": BAMBA,
    "qwen3_next": QWEN3_NEXT,
}
"""Supported families by model_type; of those that fit a model, the last one fits best."""


def family_of(model: ModelConfig) -> str:
    """Return the family whose parameters and layers are most like the model's."""
    return [name for name, family in FAMILIES.items() if family.fits(model)][-1]
