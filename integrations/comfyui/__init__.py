"""ComfyUI nodes over openlance's Python API.

Put this folder (or a link to it) into `ComfyUI/custom_nodes/openlance` and `pip install openlance` into
ComfyUI's Python. The nodes are in the category "openlance".
"""

from .nodes import NODES

NODE_CLASS_MAPPINGS = {node.__name__: node for node in NODES}
NODE_DISPLAY_NAME_MAPPINGS = {node.__name__: node.TITLE for node in NODES}

__all__ = ["NODE_CLASS_MAPPINGS", "NODE_DISPLAY_NAME_MAPPINGS"]
