"""Builds a workflow in both of ComfyUI's formats."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from workflows.files import SD15, SD35, remarks, where_from
from workflows.nodes import DEFAULTS, NODES, height_of

COLUMN, WIDTH, GAP = 430, 320, 60  # pixels: from column to column, of a node, below a node
NOTE = (760, 20)  # pixels: width of the note, and height of one of its lines
_TITLE = 30  # pixels of a node's title, which is above its position


class Workflow:
    """A workflow in both formats. Nodes stand in columns, from left to right.

    Args:
        note: what it shows, as Markdown; where to get its files is added.
        tops: where a column begins, in pixels; others begin at 0.
    """

    def __init__(self, note: str, tops: Mapping[int, int]) -> None:
        self.nodes: list[dict[str, Any]] = []
        self.links: list[list[Any]] = []
        self.api: dict[str, Any] = {}
        self.note = note
        self._next = dict(tops)

    def add(self, kind: str, column: int, title: str | None = None, **given: Any) -> list[Any]:
        """Adds a node below the others of a column.

        Args:
            kind: the type of the node.
            column: where it stands.
            title: its title; None for that of its type.
            given: links as [node, output], and plain values of widgets.

        Returns:
            Its first output.
        """
        sockets, widgets, outputs = NODES[kind]
        inputs = {**DEFAULTS.get(kind, {}), **given}
        number = len(self.nodes) + 1
        top, height = self._next.get(column, 0), height_of(kind)
        node: dict[str, Any] = {
            "id": number,
            "type": kind,
            "pos": [COLUMN * column, top],
            "size": [WIDTH, height],
            "flags": {},
            "order": number - 1,
            "mode": 0,
            "inputs": [self._link(inputs.get(name), number, i, name, sockets[name])
                       for i, name in enumerate(sockets)],
            "outputs": [{"name": name, "type": type_, "links": []} for name, type_ in outputs],
            "properties": {"Node name for S&R": kind, **where_from(inputs)},
            "widgets_values": [inputs[name] for name in widgets],
        }  # fmt: skip
        if title:
            node["title"] = title
        if "seed" in widgets:  # the browser keeps what happens to a seed as one more widget
            node["widgets_values"].insert(widgets.index("seed") + 1, "fixed")
        self._next[column] = top + height + GAP
        self.nodes.append(node)
        self.api[str(number)] = {
            "class_type": kind,
            "inputs": {name: value for name, value in inputs.items() if value is not None},
            "_meta": {"title": title or kind},
        }
        return [str(number), 0]

    def down(self, column: int, top: int) -> None:
        """Lets a column go on further down."""
        self._next[column] = max(top, self._next.get(column, top))

    def _link(self, source: list[Any] | None, target: int, slot: int, name: str, kind: str) -> Any:
        if source is None:  # an optional socket that the workflow leaves open
            return {"name": name, "type": kind, "link": None}
        number, (node, output) = len(self.links) + 1, source
        outputs = self.nodes[int(node) - 1]["outputs"]
        outputs[output]["links"].append(number)
        type_ = outputs[output]["type"]
        self.links.append([number, int(node), output, target, slot, type_])
        return {"name": name, "type": kind, "link": number}

    def for_browser(self) -> dict[str, Any]:
        """Returns the format that the browser loads, with the note as a node."""
        text = f"{self.note}\n\n{remarks(self.api)}"
        lines = sum(1 + len(line) // 85 for line in text.split("\n"))
        height = 60 + NOTE[1] * lines
        top = min(node["pos"][1] for node in self.nodes)
        note = {
            "id": len(self.nodes) + 1,
            "type": "MarkdownNote",
            "pos": [0, top - GAP - _TITLE - height],
            "size": [NOTE[0], height],
            "flags": {},
            "order": len(self.nodes),
            "mode": 0,
            "inputs": [],
            "outputs": [],
            "properties": {},
            "title": "About this workflow",
            "widgets_values": [text],
        }
        return {
            "last_node_id": note["id"],
            "last_link_id": len(self.links),
            "nodes": [*self.nodes, note],
            "links": self.links,
            "groups": [],
            "config": {},
            "extra": {},
            "version": 0.4,
        }


GARDEN = "a cat in a garden, morning light"
FLOWING = {"cfg": 4.5, "scheduler": "sgm_uniform"}  # how SD 3.5 is sampled


class Example(Workflow):
    """A workflow with a checkpoint, prompts, and pictures that are sampled and saved."""

    def __init__(self, note: str, tops: Mapping[int, int], file: str = SD15) -> None:
        super().__init__(note, tops)
        self.file = file

    def checkpoint(self, column: int = 0) -> None:
        """Adds the checkpoint: its model, text encoder and VAE."""
        self.model = self.add("CheckpointLoaderSimple", column, ckpt_name=self.file)
        number = self.model[0]
        self.clip, self.vae = [number, 1], [number, 2]

    def prompts(self, column: int, positive: str = GARDEN, negative: str = "blurry") -> None:
        """Adds the prompts and the empty latent."""
        self.positive = self.text(column, "Positive", positive)
        self.negative = self.text(column, "Negative", negative)
        self.latent(column)

    def text(self, column: int, title: str, text: str) -> list[Any]:
        """Adds a prompt."""
        return self.add("CLIPTextEncode", column, title, clip=self.clip, text=text)

    def latent(self, column: int) -> None:
        """Adds the empty latent."""
        size = 512 if self.file == SD15 else 1024
        kind = "EmptySD3LatentImage" if self.file == SD35 else "EmptyLatentImage"
        self.empty = self.add(kind, column, width=size, height=size, batch_size=1)

    def pictures(
        self,
        column: int,
        models: Mapping[str, list[Any]],
        tops: Mapping[str, int] | None = None,
        **sampling: Any,
    ) -> None:
        """Samples each model from the same noise, and saves the pictures.

        Args:
            column: of the samplers; decoders and pictures stand in the next two.
            models: by the name of the picture.
            tops: where the sampler of a picture begins, in pixels; others follow their column.
            sampling: inputs of the samplers that differ; for one of them under its name.
        """
        self.drawn: dict[str, list[Any]] = {}
        given = {
            "positive": self.positive,
            "negative": self.negative,
            "latent_image": self.empty,
            **{name: value for name, value in sampling.items() if name not in models},
        }
        for name, model in models.items():
            own = {**given, **sampling.get(name, {})}
            self.down(column, (tops or {}).get(name, 0))
            samples = self.add("KSampler", column, f"Sample: {name}", model=model, **own)
            self.drawn[name] = self.add("VAEDecode", column + 1, samples=samples, vae=self.vae)
        for name, pixels in self.drawn.items():
            self.save(column + 2, name, pixels)

    def save(self, column: int, name: str, pixels: list[Any]) -> None:
        """Saves pictures."""
        place = f"dmp/{name.lower().replace(' ', '-')}"
        self.add("SaveImage", column, name, images=pixels, filename_prefix=place)

    def compare(self, column: int, one: str, two: str) -> None:
        """Lays two of the pictures over each other, with a slider."""
        a, b = self.drawn[one], self.drawn[two]
        self.add("ImageCompare", column, f"{one} | {two}", image_a=a, image_b=b)
