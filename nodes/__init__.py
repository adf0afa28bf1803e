"""Table of contents: every node of the pack, in the order of the menu."""

from .asced.schema import NODES as ASCED_NODES
from .demo.schema import NODES as DEMO_NODES
from .fam.lora_schema import NODES as FAM_TRAINING_NODES
from .fam.schema import NODES as FAM_NODES
from .tag.schema import NODES as TAG_NODES
from .together.schema import NODES as TOGETHER_NODES

NODES = [*TOGETHER_NODES, *ASCED_NODES, *TAG_NODES, *FAM_NODES, *FAM_TRAINING_NODES, *DEMO_NODES]
