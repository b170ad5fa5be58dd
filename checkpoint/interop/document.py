"""What a rule document says, as data: which foreign names there are, and what their elements are."""

from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum

from checkpoint.interop.expression import Expression, Size
from checkpoint.interop.template import Template


class Held(Enum):
    """Which ranks of an axis hold a tensor that the axis does not divide."""

    SAME = "same"  # all of them, and the copies are equal
    MEAN = "mean"  # all of them, and the tensor is their mean
    FIRST = "first"
    LAST = "last"
    ENDS = "ends"  # the first and the last, and the copies are equal: tied weights of a pipeline
    ONE = "one"  # any one of them


@dataclass(frozen=True, slots=True)
class Concat:
    """The ranks of an axis hold consecutive parts of a dim; `copies` neighbours hold each part."""

    dim: int
    size: Expression | None = None
    copies: Expression | None = None


Use = Held | Concat


class Duplicate(Enum):
    """Whether a foreign tensor is a second copy of one that another rule fills, and has to be there."""

    NONE = "none"
    OPTIONAL = "optional"  # compared if it is there, never written
    REQUIRED = "required"  # compared, and written


@dataclass(frozen=True, slots=True)
class Numbering:
    """A number in a foreign name counts within its rank of an axis: the tensor's is `first` more."""

    axis: str
    first: Expression
    count: Expression


@dataclass(frozen=True, slots=True)
class Piece:
    """A part of a fused dim: whose it is, and how large. Without a size: an equal part."""

    to: Template
    size: Expression | None
    axes: Mapping[str, Use]


@dataclass(frozen=True, slots=True)
class Split:
    """A dim holds several tensors: its pieces in turn, `repeat` times. `number`: the turns are a series."""

    dim: int
    repeat: Expression
    number: str | None


@dataclass(frozen=True, slots=True)
class Stack:
    """A dim counts a series of tensors, such as layers or experts: `count` of them.

    As `unstack` a dim of a foreign tensor does, on its rank; as `stack` a dim of the global one, altogether.
    """

    dim: int
    number: str
    count: Expression


@dataclass(frozen=True, slots=True)
class Padding:
    """A dim is longer than the tensor: its first `real` elements count. A writer makes it `total` long."""

    dim: int
    real: Expression
    total: Expression


@dataclass(frozen=True, slots=True)
class Rule:
    """What the foreign tensors of one pattern are.

    Read in this order: transpose, unstack (a source's dim counts tensors), split into pieces, concatenate
    over axes, strip the padding, stack (the tensor's dim counts sources). Dims are those at that point.
    """

    line: int
    names: Template
    pieces: tuple[Piece, ...]
    axes: Mapping[str, Use]
    numbers: Mapping[str, Numbering]
    order: tuple[int, ...] | None = None
    unstack: Stack | None = None
    split: Split | None = None
    padding: Padding | None = None
    stack: Stack | None = None
    dtype: str | None = None
    when: Expression | None = None
    is_dropped: bool = False
    duplicate: Duplicate = Duplicate.NONE

    def __str__(self) -> str:
        return f"the rule of line {self.line} ({self.names.text})"


@dataclass(frozen=True, slots=True)
class State:
    """What an optimizer keeps per parameter. Its rule is the parameter's, whose names stand in for `{param}`.

    A `single` state is one number for all of a parameter, such as Adam's step.
    """

    line: int
    names: Template
    to: Template
    dtype: str | None
    is_single: bool
    is_optional: bool


@dataclass(frozen=True, slots=True)
class Declared:
    """Tensors that have to be there, with their shapes: one for each combination of some numbers."""

    line: int
    names: Template
    each: Mapping[str, Expression]
    shape: tuple[Expression, ...]
    when: Expression | None


@dataclass(frozen=True, slots=True)
class RuleSet:
    """A whole document. A size without a default has to be given by the user."""

    name: str
    about: str
    sizes: Mapping[str, Expression | Size | None]
    rules: tuple[Rule, ...]
    states: tuple[State, ...]
    tensors: tuple[Declared, ...]
