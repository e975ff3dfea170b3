"""Features of a detectron2 network that travel with the beliefs about them."""

from typing import Dict, NamedTuple, Optional, Union

from torch import Size, Tensor
from torch.utils._pytree import register_pytree_node

from ..layers import Belief
from ..layers.transition import Source

__all__ = ["Feature", "Features", "WithBelief", "feature_of", "value_of"]


class Feature(NamedTuple):
    """A feature map and the belief about it.

    Attributes:
        value: shape (N, C, H, W).
        belief: the belief about ``value``, or a source of the transition that stands for it.
    """

    value: Tensor
    belief: Source

    @property
    def shape(self) -> Size:
        """The shape of ``value``. It is all that an anchor generator asks for."""
        return self.value.shape


class WithBelief(str):
    """The name of a feature that is looked up with its belief.

    detectron2's detectors look up their features by name and hand a list of them to the heads.
    For a name of this type :class:`Features` returns a :class:`Feature` if there is a belief. Other
    dicts take it for an ordinary name.
    """


class Features(Dict[str, Tensor]):
    """The features of a backbone by name, as detectron2 has them, with the beliefs about them.

    For a name of type :class:`WithBelief` the item is a :class:`Feature`, if there is a belief.

    Attributes:
        beliefs (Dict[str, Belief]): the beliefs by name, for the features that have one.
    """

    def __init__(
        self,
        features: Optional[Dict[str, Tensor]] = None,
        beliefs: Optional[Dict[str, Belief]] = None,
    ):
        super().__init__(features or {})
        self.beliefs: Dict[str, Belief] = dict(beliefs or {})

    def __getitem__(self, name: str) -> Union[Tensor, Feature]:
        if isinstance(name, WithBelief):
            return feature_of(self, str(name))
        return super().__getitem__(name)


# For torch.export, which refuses outputs of an unknown type.
register_pytree_node(
    Features,
    lambda features: ([dict(features), features.beliefs], None),
    lambda parts, _: Features(*parts),
    serialized_type_name="kn_detectron.modeling.Features",
    to_dumpable_context=lambda context: "",
    from_dumpable_context=lambda text: None,
)


def feature_of(features: Dict[str, Tensor], name: str) -> Union[Tensor, Feature]:
    """One of the features of a backbone, with its belief if there is one."""
    value, belief = features[name], getattr(features, "beliefs", {}).get(name)
    return value if belief is None else Feature(value, belief)


def value_of(x: Union[Tensor, Feature]) -> Tensor:
    """The feature map, with or without a belief about it."""
    return x.value if isinstance(x, Feature) else x
