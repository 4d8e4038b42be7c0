"""Model families: what is an expert, a router and a dense twin in each. One file a family.

To add one, write a file like `qwen3_moe.py` that defines `FAMILY`, and list it in FAMILIES; or keep it outside the
package and pass its path as `family=` (`--family FILE`).
"""

from burnish.families.detect import FAMILIES, detect_family, load_family, resolve_config
from burnish.families.family import DenseTwin, Family, MoEShape, SharedExperts
from burnish.families.outline import outline
from burnish.families.router import RouterRule, Routing
from burnish.families.storage import ExpertStorage, Fused, PackedMxfp4, Separate, WritableStorage
from burnish.families.student import FeedForward, Student, dense_config, describe_student

__all__ = [
    "FAMILIES",
    "DenseTwin",
    "ExpertStorage",
    "Family",
    "FeedForward",
    "Fused",
    "MoEShape",
    "PackedMxfp4",
    "RouterRule",
    "Routing",
    "Separate",
    "SharedExperts",
    "Student",
    "WritableStorage",
    "dense_config",
    "describe_student",
    "detect_family",
    "load_family",
    "outline",
    "resolve_config",
]
