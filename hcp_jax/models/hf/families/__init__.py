"""List the supported families of Hugging Face models, one module for each or for close relatives.

To add a family, write its module beside this file and list it here.
"""

from hcp_jax.models.config import ModelConfig
from hcp_jax.models.hf.families.family import Family
from hcp_jax.models.hf.families.gemma3 import GEMMA3_TEXT
from hcp_jax.models.hf.families.llama import LLAMA, MISTRAL
from hcp_jax.models.hf.families.mixtral import MIXTRAL
from hcp_jax.models.hf.families.olmo2 import OLMO2
from hcp_jax.models.hf.families.qwen import QWEN2, QWEN3, QWEN3_MOE
from hcp_jax.models.hf.families.smollm3 import SMOLLM3

FAMILIES: dict[str, Family] = {
    "llama": LLAMA,
    "mistral": MISTRAL,
    "qwen2": QWEN2,
    "qwen3": QWEN3,
    "smollm3": SMOLLM3,
    "olmo2": OLMO2,
    "gemma3_text": GEMMA3_TEXT,
    "mixtral": MIXTRAL,
    "qwen3_moe": QWEN3_MOE,
}
"""Supported families by model_type; of those that fit a model, the last one fits best."""


def family_of(model: ModelConfig) -> str:
    """Return the family whose parameters and layers are most like the model's."""
    return [name for name, family in FAMILIES.items() if family.fits(model)][-1]
