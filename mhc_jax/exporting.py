"""Names the nodes of trees for `jax.export`, which writes a program together with the trees that it takes.

JAX knows tuples, lists and dicts. A train state has a class of flax and named tuples of optax beside them.
"""

import collections
import threading
from typing import Any

import jax

# What `jax.export` writes without being told.
_KNOWN = (tuple, list, dict, collections.OrderedDict, type(None))
_lock = threading.Lock()
_named: set[type] = set()


def name_nodes(*trees: Any) -> None:
    """Names every type of node in the trees, so that a program which takes or gives them can be written.

    Call it with `abstract_state(config)` before `jax.export.Exported.serialize`, and once more in a process
    that reads the program, before `jax.export.deserialize`: both have to know the same names. The name of a
    type is its module and its class, "optax._src.base.EmptyState". A type is named once: a further call, or
    a name that somebody else gave it, changes nothing.

    Args:
      trees: pytrees, of arrays or of their shapes.

    Raises:
      TypeError: a node that keeps something beside its children, such as a `flax.struct` class with a static
        field: only its author knows how to write that.
    """
    with _lock:
        for tree in trees:
            _name(jax.tree.structure(tree))


def _name(tree: jax.tree_util.PyTreeDef) -> None:
    node = tree.node_data()
    if node is None:  # a leaf
        return
    kind, beside = node
    if kind not in _KNOWN and kind not in _named:
        _register(kind, beside)
        _named.add(kind)
    for child in tree.children():
        _name(child)


def _register(kind: type, beside: Any) -> None:
    name = f"{kind.__module__}.{kind.__qualname__}"
    is_named_tuple = issubclass(kind, tuple) and hasattr(kind, "_fields")
    if not is_named_tuple:
        _nothing(name, beside)
    try:
        if is_named_tuple:
            jax.export.register_namedtuple_serialization(kind, serialized_name=name)
        else:
            jax.export.register_pytree_node_serialization(
                kind,
                serialized_name=name,
                serialize_auxdata=lambda found: _nothing(name, found),
                deserialize_auxdata=lambda _: beside,
            )
    except ValueError as error:
        if "registration for type" not in str(error):  # another type has this name
            raise


def _nothing(name: str, beside: Any) -> bytes:
    if beside is None or beside == ():
        return b""
    raise TypeError(
        f"{name} keeps {beside!r:.60} beside its arrays: name it by "
        "jax.export.register_pytree_node_serialization"
    )
