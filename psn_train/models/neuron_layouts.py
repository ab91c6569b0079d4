"""What the tensors of a neuron layer in a stranger's file mean: which neuron they are, its T and k, how to read them.

Legend of shapes: T time-steps, k order of a sliding PSN, C channels; a digit stands for itself, "" for a scalar.

Sources: the authors' code and SpikingJelly 2.0; this project's own names are read too.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field

import torch
from torch import Size, Tensor

AUTHORS, SPIKINGJELLY, OWN = "authors", "spikingjelly", "psn_train"

# neurons whose layers have no tensors
WITHOUT_TENSORS = ("if", "lif", "lif_no_reset")
# the authors' names of neurons, where a checkpoint's options say one
AUTHORS_NAMES = {"if5": "psn", "if5pmd8": "masked_psn", "mspsn": "sliding_psn"}
# GLIF: SpikingJelly's name -> ours
GLIF_NAMES = {
    "alpha": "gate_alpha",
    "beta": "gate_beta",
    "gamma": "gate_gamma",
    **{name: name for name in ("tau", "v_threshold", "linear_decay", "v_subreset", "conduct")},
}

Change = Callable[[Tensor, Size], Tensor]  # (theirs, our shape) -> ours


@dataclass(frozen=True)
class Entry:
    """Where a tensor goes, and what is done to it on the way."""

    name: str
    change: Change | None = None
    why: str = ""

    def apply(self, theirs: Tensor, shape: Size | None) -> Tensor:
        """What the model gets, of its shape; where that cannot be, theirs as it is, for the caller to refuse."""
        if self.change is None or shape is None:
            return theirs
        try:
            return self.change(theirs, shape)
        except RuntimeError:
            return theirs


def _reshape(theirs: Tensor, shape: Size) -> Tensor:
    return theirs.reshape(shape)


def _negate(theirs: Tensor, shape: Size) -> Tensor:
    return -theirs.reshape(shape)


def _spread(theirs: Tensor, shape: Size) -> Tensor:
    """A layer's one value (of each step) for all channels: [] -> [C], [T] -> [T, C]."""
    return theirs.reshape(*theirs.shape, 1).expand(shape).clone()


@dataclass(frozen=True)
class Form:
    """One way of writing a neuron down. `tensors`: their name -> its shape in letters."""

    neuron: str
    origin: str | None  # None: more than one writes it so
    tensors: dict[str, str]
    channels_alike: bool = False  # one value a layer where our network has one a channel

    def sizes(self, layer: Mapping[str, Tensor]) -> dict[str, int] | None:
        """{"T": 4, ...} if the tensors of a layer have this form, else None."""
        if layer.keys() != self.tensors.keys():
            return None
        sizes: dict[str, int] = {}
        for name, letters in self.tensors.items():
            shape = layer[name].shape
            if len(shape) != len(letters) or 0 in shape:
                return None
            for letter, size in zip(letters, shape, strict=True):
                if sizes.setdefault(letter, int(letter) if letter.isdigit() else size) != size:
                    return None
        return sizes

    def entry(self, name: str) -> Entry | None:
        """Where a tensor of this form goes; None for one that only says what the neuron is, such as a mask."""
        last = name.rpartition(".")[2]
        letters = self.tensors[name]
        if last in ("mask0", "mask1", "order"):
            return None
        if self.neuron == "glif":
            target = GLIF_NAMES.get(last, last)
            if self.channels_alike:
                return Entry(target, _spread, "the layer's value, for every channel")
            return Entry(target)
        if last == "threshold" and "11k" in self.tensors.values():
            return Entry("bias", _negate, "sliding PSN of the conv form: a threshold that is subtracted, so negated")
        if last == "threshold":
            return Entry("bias", None, "sliding PSN of the gemm form: called threshold, but added, so taken as it is")
        if letters == "11k":
            return Entry("weight", _reshape, "[1, 1, k] to [k]")
        if letters == "T1":
            return Entry("bias", _reshape, "[T, 1] to [T]")
        return Entry({"_lambda_": "lambda_"}.get(last, last))


_MASKS = {"mask0": "TT", "mask1": "TT"}


def _inside(prefix: str, tensors: dict[str, str]) -> dict[str, str]:
    return {prefix + name: letters for name, letters in tensors.items()}


_GLIF = [name for name in GLIF_NAMES if name != "conduct"]

FORMS: tuple[Form, ...] = (
    Form("psn", AUTHORS, {"fc.weight": "TT", "fc.bias": "T"}),
    *(
        Form("masked_psn", AUTHORS, _inside(prefix, {"weight": "TT", "bias": bias, **_MASKS}))
        for prefix in ("fc.", "")
        for bias in ("T", "T1")
    ),
    Form("sliding_psn", AUTHORS, {"weight": "k", "threshold": ""}),
    Form("sliding_psn", AUTHORS, {"weight": "11k", "threshold": ""}),
    Form("psn", SPIKINGJELLY, {"weight": "TT", "bias": "T1"}),
    Form("masked_psn", SPIKINGJELLY, {"weight": "TT", "bias": "T1", "_lambda_": "", **_MASKS}),
    Form("glif", SPIKINGJELLY, {**dict.fromkeys(_GLIF, ""), "conduct": "T"}, channels_alike=True),
    Form("glif", SPIKINGJELLY, {**dict.fromkeys(_GLIF, "C"), "conduct": "TC"}),
    Form("psn", OWN, {"weight": "TT", "bias": "T"}),
    Form("masked_psn", OWN, {"weight": "TT", "bias": "T", "lambda_": "", "order": ""}),
    Form("glif", OWN, {**{GLIF_NAMES[name]: "C" for name in _GLIF}, "conduct": "TC"}),
    Form("sliding_psn", None, {"weight": "k", "bias": ""}),
    Form("plif", None, {"w": ""}),
    Form("klif", None, {"k": ""}),
)


@dataclass
class NeuronLayout:
    """What the neuron layers of a file are."""

    neuron: str | None  # None: they have no tensors, and nobody said which neuron they are
    origin: str | None
    T: int | None = None
    k: int | None = None
    entries: dict[str, Entry] = field(default_factory=dict)  # their name, whole -> ours, whole
    given: dict[str, str] = field(default_factory=dict)  # tensors that say what the network is -> what they say
    made: dict[str, tuple[Tensor, str]] = field(default_factory=dict)  # ours that the file lacks -> value, whence
    notes: list[str] = field(default_factory=list)


def read_neurons(
    tensors: Mapping[str, Tensor],
    layers: Mapping[str, str],
    *,
    neuron: str | None = None,
    k: int | None = None,
    lambda_: float | None = None,
    hint: str | None = None,
) -> NeuronLayout:
    """What the neurons of a file are.

    Args:
        tensors: of the whole file. layers: their name of each neuron layer -> ours.
        neuron, k, lambda_: what the user says; has to agree with what the tensors say.
        hint: what the checkpoint's options call the neuron.

    Errors: ValueError if a layer is of no known form, layers disagree, or the user's word contradicts the tensors.
    """
    inside = {theirs: _layer(tensors, theirs) for theirs in layers}
    if not any(inside.values()):
        if lambda_ is not None:
            raise ValueError(f"--lambda {lambda_:g}: it has no tensor of a neuron, so no mask to close")
        return NeuronLayout(neuron, None, k=k)
    form, sizes = _one_form(inside)
    name = neuron or form.neuron
    unmasked_twin = form.neuron == "psn" and neuron == "masked_psn"
    if name != form.neuron and not unmasked_twin:
        raise ValueError(
            f"its neurons are {form.neuron} ({_described(inside[next(iter(layers))])}), not {neuron}; drop --neuron"
        )
    if neuron is None and form.neuron == "psn" and AUTHORS_NAMES.get(hint or "", hint) == "masked_psn":
        raise ValueError(
            f"its options call the neuron {hint!r}, a masked PSN, but it holds no masks, so its order is not known; "
            "give --neuron masked_psn --k K, or --neuron psn for what its tensors alone say"
        )
    layout = NeuronLayout(name, form.origin, T=sizes.get("T"), k=sizes.get("k"))
    if AUTHORS_NAMES.get(hint or "", name) != name:
        layout.notes.append(f"its options call the neuron {hint!r}; its tensors are those of {name} and are believed")
    for theirs, ours in layers.items():
        for suffix in inside[theirs]:
            entry = form.entry(suffix)
            if entry is not None:
                layout.entries[f"{theirs}.{suffix}"] = Entry(f"{ours}.{entry.name}", entry.change, entry.why)
    if name == "masked_psn":
        _read_masks(layout, inside, layers, form, k, lambda_)
    elif lambda_ is not None:
        raise ValueError(f"--lambda is for masked_psn; its neurons are {name}")
    elif k is not None and k != layout.k:
        raise ValueError(
            f"its neurons are of order k={layout.k}, not {k}; drop --k"
            if layout.k is not None
            else f"--k is for masked and sliding PSN; its neurons are {name}"
        )
    return layout


def _layer(tensors: Mapping[str, Tensor], name: str) -> dict[str, Tensor]:
    return {key.removeprefix(f"{name}."): tensor for key, tensor in tensors.items() if key.startswith(f"{name}.")}


def _described(layer: Mapping[str, Tensor]) -> str:
    return ", ".join(f"{name} {list(tensor.shape)}" for name, tensor in layer.items()) or "no tensors"


def _one_form(inside: Mapping[str, Mapping[str, Tensor]]) -> tuple[Form, dict[str, int]]:
    """The form that all layers have, and the sizes on which they agree."""
    found: dict[str, list[str]] = {}
    chosen: Form | None = None
    all_sizes: dict[str, dict[int, list[str]]] = {}
    for name, layer in inside.items():
        # a layer of T = 1 may have several forms; the first layer decides
        forms = [form for form in FORMS if form.sizes(layer) is not None]
        if not forms:
            raise ValueError(
                f"neuron layer {name} holds {_described(layer)}: no known neuron. Known are "
                + "; ".join(f"{form.neuron}: {_letters(form)}" for form in FORMS)
            )
        chosen = chosen or forms[0]
        if chosen not in forms:
            found.setdefault(_letters(forms[0]), []).append(name)
        for letter, size in forms[0].sizes(layer).items():
            if letter in "Tk":
                all_sizes.setdefault(letter, {}).setdefault(size, []).append(name)
    if found:
        others = "; ".join(f"{letters} in {_few(names)}" for letters, names in found.items())
        raise ValueError(
            f"its neuron layers are not of one kind: {next(iter(inside))} holds {_letters(chosen)}, but {others}"
        )
    for letter, sizes in all_sizes.items():
        if len(sizes) > 1:
            said = "; ".join(f"{letter}={size} in {_few(names)}" for size, names in sizes.items())
            raise ValueError(f"its neuron layers disagree: {said}; a network has one {letter}")
    return chosen, {letter: next(iter(sizes)) for letter, sizes in all_sizes.items()}


def _letters(form: Form) -> str:
    return ", ".join(f"{name} [{', '.join(letters)}]" for name, letters in form.tensors.items())


def _few(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


# ---- masked PSN: its order and its lambda


def band_order(mask: Tensor) -> int | None:
    """k if the mask [T, T] is M[i][j] = 1 where j <= i <= j + k - 1, else 0; otherwise None."""
    T = mask.shape[0]
    k = int(mask[:, 0].count_nonzero())
    ones = torch.ones(T, T)
    return k if k >= 1 and torch.equal(mask.float(), ones.tril() * ones.triu(1 - k)) else None


def _orders(layer: Mapping[str, Tensor], form: Form) -> Iterator[tuple[int | None, str]]:
    """(k, the tensor that says it) of a layer. Which of the two masks is the band is seen, not believed."""
    if "order" in layer:
        yield int(layer["order"]), "order"
        return
    masks = {name: layer[name] for name in form.tensors if name.rpartition(".")[2] in ("mask0", "mask1")}
    bands = {name: mask for name, mask in masks.items() if not bool((mask == 1).all())}
    if not masks:
        return
    if not bands and form.tensors and next(iter(masks.values())).shape[0] == 1:
        bands = dict(list(masks.items())[:1])
    name = next(iter(bands), next(iter(masks)))
    yield band_order(masks[name]) if len(bands) == 1 else None, name


def _read_masks(
    layout: NeuronLayout,
    inside: Mapping[str, Mapping[str, Tensor]],
    layers: Mapping[str, str],
    form: Form,
    k: int | None,
    lambda_: float | None,
) -> None:
    for theirs, layer in inside.items():
        for suffix, tensor in layer.items():
            if suffix.rpartition(".")[2] in ("weight", "bias"):
                continue
            if tensor.is_complex() or not bool(tensor.isfinite().all()):
                raise ValueError(f"{theirs}.{suffix}: some of its numbers are complex or not finite ({tensor.dtype})")
    said: dict[int, list[str]] = {}
    for theirs, layer in inside.items():
        for order, name in _orders(layer, form):
            if order is None:
                raise ValueError(
                    f"{theirs}.mask0, {theirs}.mask1: wanted a band of k diagonals and a matrix of ones, of a masked "
                    "PSN; these are neither"
                )
            said.setdefault(order, []).append(theirs)
            layout.given[f"{theirs}.{name}"] = f"says k = {order}"
        for suffix in layer:
            if suffix.rpartition(".")[2] in ("mask0", "mask1"):
                layout.given.setdefault(f"{theirs}.{suffix}", "a mask of ones, which says nothing")
    if len(said) > 1:
        told = "; ".join(f"k={order} in {_few(names)}" for order, names in said.items())
        raise ValueError(f"its neuron layers disagree: {told}; a network has one k")
    if said and k not in (None, *said):
        raise ValueError(f"its masks are of order k={next(iter(said))}, not {k}; drop --k")
    if not said and k is None:
        raise ValueError("it holds no masks, so the order of its masked PSN is not known; give --k K")
    layout.k = next(iter(said), k)
    held = {float(layer[name]) for layer in inside.values() for name in ("_lambda_", "lambda_") if name in layer}
    if held and lambda_ is not None and held != {lambda_}:
        raise ValueError(f"--lambda {lambda_:g}: the file says lambda = {_values(held)}; drop --lambda")
    whence = "from its masks" if said else "as --k says"
    for ours in layers.values():
        layout.made[f"{ours}.order"] = torch.tensor(layout.k), f"k = {layout.k}, {whence}"
    if held:
        layout.notes.append(f"lambda = {_values(held)}, as the file says" + _unmasked(min(held)))
        return
    value = 1.0 if lambda_ is None else float(lambda_)
    if not 0.0 <= value <= 1.0:
        raise ValueError(f"--lambda {value:g}: wanted a number from 0 to 1")
    whence = "taken because nobody said" if lambda_ is None else "as --lambda says"
    for ours in layers.values():
        layout.made[f"{ours}.lambda_"] = torch.tensor(value), f"{value:g}, {whence}"
    layout.notes.append(
        f"THE FILE DOES NOT HOLD LAMBDA: {value:g} {whence}"
        + _unmasked(value)
        + ("; for a checkpoint from before the mask closed give --lambda" if lambda_ is None else "")
    )


def _values(values: set[float]) -> str:
    return ", ".join(f"{value:g}" for value in sorted(values))


def _unmasked(value: float) -> str:
    return ": THE MASK IS NOT CLOSED, these neurons see the future" if value < 1 else ""
