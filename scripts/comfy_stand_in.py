"""A stand-in for what the node files import of ComfyUI, so that schemas and nodes can be read and tested without it.

`loaded_pack()` imports this folder as ComfyUI does: as a package under a name of its own, with `mapo_core` inside. What
`object_info` gives is compared with real servers by tests/comfyui/test_object_info.py.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any, ClassVar

ROOT = Path(__file__).resolve().parent.parent
PACK = "comfyui_mapo_pack"


# --- the schema of nodes ---------------------------------------------------------------------------------------------


class Input:
    """An input; `type` is what /object_info calls it."""

    type: Any = None

    def __init__(
        self, id: str, display_name: str | None = None, optional: bool = False, tooltip: str | None = None
    ) -> None:
        self.id, self.display_name, self.optional, self.tooltip = id, display_name, optional, tooltip

    def options(self) -> dict[str, Any]:
        """What /object_info says of it; what is None is left out."""
        return _given(display_name=self.display_name, tooltip=self.tooltip)


class WidgetInput(Input):
    """An input that is a widget as long as nothing is linked to it."""

    shown: ClassVar[tuple[str, ...]] = ()
    fixed: ClassVar[dict[str, Any]] = {}

    def __init__(
        self,
        id: str,
        *,
        display_name: str | None = None,
        optional: bool = False,
        tooltip: str | None = None,
        default: Any = None,
        **more: Any,
    ) -> None:
        super().__init__(id, display_name, optional, tooltip)
        unknown = set(more) - set(self.shown)
        if unknown:
            raise TypeError(f"{type(self).__qualname__} takes no {', '.join(sorted(unknown))} in ComfyUI 0.3.64")
        self.default = default
        self.more = {**self.fixed, **more}

    def __getattr__(self, name: str) -> Any:
        if name in type(self).shown:
            return self.__dict__["more"].get(name)
        raise AttributeError(name)

    def options(self) -> dict[str, Any]:
        """As for every input, with the widget's own."""
        return super().options() | _given(default=self.default, **self.more)


class Output:
    """An output."""

    type: Any = None

    def __init__(self, id: str | None = None, display_name: str | None = None, tooltip: str | None = None) -> None:
        self.id, self.display_name, self.tooltip = id, display_name, tooltip


def custom(name: str) -> Any:
    """A type of links: its Input and Output."""
    return SimpleNamespace(
        io_type=name, Input=type("Input", (Input,), {"type": name}), Output=type("Output", (Output,), {"type": name})
    )


def widget(name: str, *shown: str, **fixed: Any) -> Any:
    """A type whose inputs are widgets."""
    made = custom(name)
    made.Input = type("Input", (WidgetInput,), {"type": name, "shown": shown, "fixed": fixed})
    return made


class _ComboInput(WidgetInput):
    type = "COMBO"
    shown: ClassVar[tuple[str, ...]] = ("options", "control_after_generate")
    fixed: ClassVar[dict[str, Any]] = {"multiselect": False}

    def __init__(self, id: str, options: list[str], **more: Any) -> None:
        super().__init__(id, options=options, **more)

    def options(self) -> dict[str, Any]:  # type: ignore[override]  # the method of Input, and the list of choices
        return Input.options(self) | _given(default=self.default, **self.more)

    @property
    def choices(self) -> list[str]:
        """What can be chosen."""
        return self.more["options"]


@dataclass
class Schema:
    """What a node is; the fields that ComfyUI 0.3.64 knows and the nodes use."""

    node_id: str
    display_name: str | None = None
    category: str = "sd"
    inputs: list[Input] = field(default_factory=list)
    outputs: list[Output] = field(default_factory=list)
    hidden: list[str] = field(default_factory=list)
    description: str = ""
    is_output_node: bool = False
    not_idempotent: bool = False


class NodeOutput:
    """What `execute` gives."""

    def __init__(self, *args: Any, ui: Any = None) -> None:
        self.args = args
        self.ui = ui.as_dict() if hasattr(ui, "as_dict") else ui

    @property
    def result(self) -> tuple[Any, ...] | None:
        """The outputs."""
        return self.args or None


class ComfyNode:
    """The base class of nodes; `hidden` is set before a node is executed."""

    hidden: Any = SimpleNamespace(unique_id="1")

    @classmethod
    def define_schema(cls) -> Schema:
        """What the node is."""
        raise NotImplementedError

    @classmethod
    def GET_SCHEMA(cls) -> Schema:
        """The schema, checked as ComfyUI checks it when a pack is loaded."""
        schema = cls.define_schema()
        ids = [one.id for one in (*schema.inputs, *schema.outputs) if one.id]
        twice = {one for one in ids if ids.count(one) > 1}
        if twice:
            raise ValueError(f"{schema.node_id}: {', '.join(sorted(twice))} is an id more than once")
        return schema


def object_info(node: type[ComfyNode]) -> dict[str, Any]:
    """The part of /object_info that comes from the schema."""
    schema = node.GET_SCHEMA()
    inputs: dict[str, dict[str, Any]] = {"required": {}}
    for one in schema.inputs:
        inputs.setdefault("optional" if one.optional else "required", {})[one.id] = [one.type, one.options()]
    hidden = dict.fromkeys([*schema.hidden, *(("prompt", "extra_pnginfo") if schema.is_output_node else ())])
    if hidden:
        inputs["hidden"] = {name: [name.upper()] for name in hidden}
    return {
        "input": inputs,
        "input_order": {group: list(ids) for group, ids in inputs.items()},
        "output": [str(one.type) for one in schema.outputs],
        "output_is_list": [False for _ in schema.outputs],
        "output_name": [one.display_name or str(one.type) for one in schema.outputs],
        "output_tooltips": [one.tooltip for one in schema.outputs],
        "name": schema.node_id,
        "display_name": schema.display_name,
        "description": schema.description,
        "category": schema.category,
        "output_node": schema.is_output_node,
    }


def _given(**values: Any) -> dict[str, Any]:
    return {name: value for name, value in values.items() if value is not None}


# --- the modules -----------------------------------------------------------------------------------------------------


class InterruptProcessingException(Exception):
    """What ComfyUI raises when the user has pressed Cancel."""


class ProgressBar:
    """Notes what it is told."""

    told: ClassVar[list[tuple[int, int, Any]]] = []

    def __init__(self, total: int, node_id: str | None = None) -> None:
        self.total, self.node_id = total, node_id

    def update_absolute(self, value: int, total: int | None = None, preview: Any = None) -> None:
        """Note where things stand."""
        self.told.append((value, total or self.total, preview))


@dataclass
class Comfy:
    """What the stand-in does, and what has been done to it.

    Attributes:
        base: the folder that input, output and models lie in.
        cancelled: whether the user has pressed Cancel; taking notice of it resets it.
        sent: events that were sent to the page.
        unloaded: how often the models were.
    """

    base: Path
    cancelled: bool = False
    sent: list[tuple[str, dict[str, Any]]] = field(default_factory=list)
    unloaded: int = 0

    def names(self, kind: str) -> list[str]:
        """The model files of a kind."""
        folder = self.base / "models" / kind
        return sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file())

    def path(self, kind: str, name: str) -> str | None:
        """Where a model file lies."""
        path = self.base / "models" / kind / name
        return str(path) if path.is_file() else None

    def check(self) -> None:
        """Raise if the user has pressed Cancel."""
        if self.cancelled:
            self.cancelled = False
            raise InterruptProcessingException

    def unload(self) -> None:
        """Count it."""
        self.unloaded += 1


def modules(comfy: Comfy) -> dict[str, ModuleType]:
    """The modules by their names."""
    io = SimpleNamespace(
        Schema=Schema,
        ComfyNode=ComfyNode,
        NodeOutput=NodeOutput,
        Input=Input,
        Output=Output,
        Custom=custom,
        Hidden=SimpleNamespace(unique_id="unique_id", prompt="prompt", extra_pnginfo="extra_pnginfo"),
        Combo=SimpleNamespace(io_type="COMBO", Input=_ComboInput),
        String=widget("STRING", "multiline", "placeholder", "dynamic_prompts", multiline=False),
        Int=widget("INT", "min", "max", "step", "control_after_generate"),
        Float=widget("FLOAT", "min", "max", "step", "round"),
        Boolean=widget("BOOLEAN", "label_on", "label_off"),
        Image=custom("IMAGE"),
        Model=custom("MODEL"),
        Clip=custom("CLIP"),
        Vae=custom("VAE"),
        LoraModel=custom("LORA_MODEL"),
    )
    ui = SimpleNamespace(PreviewImage=_PreviewImage)
    extension = type("ComfyExtension", (), {})
    folders = SimpleNamespace(
        get_output_directory=lambda: str(comfy.base / "output"),
        get_input_directory=lambda: str(comfy.base / "input"),
        get_folder_paths=lambda kind: [str(comfy.base / "models" / kind)],
        get_filename_list=comfy.names,
        get_full_path=comfy.path,
    )
    management = SimpleNamespace(
        throw_exception_if_processing_interrupted=comfy.check,
        InterruptProcessingException=InterruptProcessingException,
        unload_all_models=comfy.unload,
        soft_empty_cache=lambda: None,
        intermediate_device=lambda: "cpu",
    )
    server = SimpleNamespace(
        client_id="page",
        send_sync=lambda event, detail, client: comfy.sent.append((event, detail)),
        prompt_queue=SimpleNamespace(currently_running={}),
    )
    return {
        "comfy_api": _module("comfy_api"),
        "comfy_api.latest": _module("comfy_api.latest", io=io, ui=ui, ComfyExtension=extension),
        "folder_paths": _module("folder_paths", **vars(folders)),
        "comfy": _module("comfy"),
        "comfy.model_management": _module("comfy.model_management", **vars(management)),
        "comfy.utils": _module("comfy.utils", ProgressBar=ProgressBar, load_torch_file=_load_torch_file),
        "server": _module("server", PromptServer=SimpleNamespace(instance=server)),
    }


class _PreviewImage:
    """The pictures that a node shows, as they are; ComfyUI writes them into its temp folder."""

    def __init__(self, image: Any, cls: Any = None) -> None:
        self.image = image

    def as_dict(self) -> dict[str, Any]:
        return {"images": list(self.image)}


def _load_torch_file(path: str, safe_load: bool = False) -> dict[str, Any]:
    from safetensors.torch import load_file

    return load_file(path)


def _module(name: str, **attributes: Any) -> ModuleType:
    made = ModuleType(name)
    made.__dict__.update(attributes)
    return made


# --- the pack --------------------------------------------------------------------------------------------------------


class _OneCore(MetaPathFinder, Loader):
    """Gives the pack the `mapo_core` that is imported anyway: with two, classes of the same name would differ."""

    def __init__(self) -> None:
        self._specs: dict[str, ModuleSpec | None] = {}

    def find_spec(self, fullname: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        if fullname == f"{PACK}.mapo_core" or fullname.startswith(f"{PACK}.mapo_core."):
            return ModuleSpec(fullname, self)
        return None

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        module = importlib.import_module(spec.name.removeprefix(f"{PACK}."))
        self._specs[spec.name] = module.__spec__
        return module

    def exec_module(self, module: ModuleType) -> None:
        assert module.__spec__ is not None
        module.__spec__ = self._specs[module.__spec__.name]  # the import has put the alias there


@contextmanager
def loaded_pack(base: Path) -> Iterator[tuple[ModuleType, Comfy]]:
    """The pack as ComfyUI has it, with `base` as ComfyUI's folder; afterwards nothing of it is left in sys.modules."""
    comfy = Comfy(base)
    for folder in ("input", "output", "temp", "models/checkpoints", "models/loras"):
        (base / folder).mkdir(parents=True, exist_ok=True)
    stand_ins = modules(comfy)
    covered = {name: sys.modules[name] for name in stand_ins if name in sys.modules}
    sys.modules.update(stand_ins)
    one_core = _OneCore()
    sys.meta_path.insert(0, one_core)
    for name in stand_ins:
        parent, _, last = name.rpartition(".")
        if parent:
            setattr(stand_ins[parent], last, stand_ins[name])
    try:
        spec = importlib.util.spec_from_file_location(
            PACK, ROOT / "__init__.py", submodule_search_locations=[str(ROOT)]
        )
        assert spec is not None
        assert spec.loader is not None
        pack = importlib.util.module_from_spec(spec)
        sys.modules[PACK] = pack
        spec.loader.exec_module(pack)
        yield pack, comfy
    finally:
        sys.meta_path.remove(one_core)
        for name in [n for n in sys.modules if n in stand_ins or n == PACK or n.startswith(f"{PACK}.")]:
            del sys.modules[name]
        sys.modules.update(covered)


def node_classes() -> list[type[ComfyNode]]:
    """All nodes of the loaded pack, in the order of the menu, without its routes."""
    names = importlib.import_module(f"{PACK}.nodes").MODULES
    return [node for name in names for node in importlib.import_module(f"{PACK}.nodes.{name}").NODES]


def schemas() -> dict[str, dict[str, Any]]:
    """`object_info` of every node as a fresh installation without models and runs shows it."""
    before = os.environ.get("MAPO_HOME")
    with tempfile.TemporaryDirectory() as folder, loaded_pack(Path(folder)):
        os.environ["MAPO_HOME"] = folder
        try:
            return {info["name"]: info for info in map(object_info, node_classes())}
        finally:
            if before is None:
                del os.environ["MAPO_HOME"]
            else:
                os.environ["MAPO_HOME"] = before
