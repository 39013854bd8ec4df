"""ComfyUI's graph in a picture (`prompt`, or `workflow` where that is all): followed from the picture back to how it was drawn."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from ldm.config.counts import plural
from ldm.sampling.comfy_workflow import nodes_of
from ldm.sampling.foreign_recipe import ForeignRecipe, Reading, shown
from ldm.sampling.recipe_values import number_of
from ldm.text.prompt_syntax import BREAK, LEARNED

PROGRAM = "ComfyUI"
MAX_NODES = 5000
MAX_HOPS = 100  # links in a row
MAX_PROMPT = 100_000  # characters that joined texts may have
# Inputs that no picture comes in by.
ASIDE = {"model", "clip", "vae", "positive", "negative", "conditioning", "guider", "noise", "sampler", "sigmas", "mask", "control_net"}
ASIDE |= {"upscale_model", "clip_vision", "clip_vision_output", "audio", "seed", "steps", "cfg", "denoise", "text", "width", "height"}
PICTURE = ("samples", "latent_image", "latent", "images", "image", "pixels")  # inputs by which it usually comes, the likeliest first
PLAIN = re.compile(r"save|preview|empty.*latent|vae.*(?:en|de)code|load.*image|sampler|reroute|latentbatch|latentfrombatch", re.IGNORECASE)
SCALES = {"LatentUpscale", "LatentUpscaleBy", "ImageScale", "ImageScaleBy", "ImageUpscaleWithModel"}
MASKED = {"SetLatentNoiseMask", "VAEEncodeForInpaint", "InpaintModelConditioning"}
TEXTS = (
    "text",
    "string",
    "populated_text",
    "prompt",
    "value",
    "text_g",
    "clip_l",
    "t5xxl",
    "text_l",
    "text_positive",
    "positive",
    "positive_prompt",
    "negative",
    "text_negative",
    "negative_prompt",
)
NEGATIVE = re.compile(r"negative|^neg(?:$|_)", re.IGNORECASE)  # inputs that hold the text of what is not wanted
VALUES = ("value", "seed", "noise_seed", "int", "float", "number", "Value")
JOINS = re.compile(r"concat|join|combine|append", re.IGNORECASE)
BETWEEN = ("delimiter", "separator")
# Nodes that give the text that they hold; of the others nobody knows what they make of it, such as language models and taggers.
HOLDS = re.compile(
    r"text|string|prompt|primitive|constant|literal|multiline|reroute|encode|loader|positive|negative|show|display|preview|wildcard|switch"
    r"|input|sampler|save|note|list",
    re.IGNORECASE,
)
WRITES = re.compile(
    r"generat|random|llm|gpt|llama|gemini|qwen|claude|caption|tagger|interrogat|florence|translat|enhanc|expan", re.IGNORECASE
)


@dataclass(frozen=True)
class Node:
    """A node: its class, and by name its values and links ([node, output])."""

    kind: str
    inputs: Mapping[str, Any]


@dataclass
class Pass:
    """One run of a sampler, or several that go on where the one before stopped."""

    id: str
    inputs: Mapping[str, Any]  # positive, negative, model and latent_image, of whatever node has them
    steps: Any = None
    guidance: Any = None
    seed: Any = None
    sampler: Any = None
    scheduler: Any = None
    strength: Any = 1.0
    start: int = 0
    end: int = 10_000
    fresh: bool = True  # whether it adds noise
    split: bool = False  # whether its steps are counted over the whole way, as KSamplerAdvanced's are
    between: list[Node] = field(default_factory=list)  # what lies on the way from what it starts from, the nearest first


def read_graph(text: Mapping[str, str]) -> ForeignRecipe | None:
    """What ComfyUI's chunks tell of their picture; None where they are no graph with a sampler."""
    for name in ("prompt", "workflow"):
        try:
            nodes = nodes_of(json.loads(text[name]))
        except (KeyError, ValueError, RecursionError):
            continue
        if 0 < len(nodes) <= MAX_NODES and (found := Graph({id: Node(*node) for id, node in nodes.items()}).read()):
            return found
    return None


class Graph:
    """The nodes, and what is read of them."""

    def __init__(self, nodes: Mapping[str, Node]) -> None:
        self.nodes, self.found = nodes, Reading()
        self.said: dict[tuple[str, str], str | None] = {}  # texts of nodes by the role that they are read for, once they are known

    def at(self, link: Any) -> tuple[str, Node] | None:
        """The node that a link comes from."""
        if not (isinstance(link, list) and len(link) == 2 and isinstance(link[0], str | int)):
            return None
        node = self.nodes.get(str(link[0]))
        return None if node is None else (str(link[0]), node)

    def read(self) -> ForeignRecipe | None:
        """The recipe; None where no node is a sampler."""
        passes = {id: one for id, node in self.nodes.items() if (one := self.pass_of(id, node))}
        if not passes:
            return None
        ends = self._ends(passes)
        chains = {id: self._chain(id, passes) for id in dict.fromkeys(one for _, one, _ in ends)}
        last = max(chains, key=lambda id: len(chains[id]))
        end, _, after = next(one for one in ends if one[1] == last)
        if len(chains) > 1:
            self.found.lose(f"{len(chains)} pictures end this graph; that of node {shown(end)} ({shown(self.nodes[end].kind)}) is taken")
        self._after(after)
        groups = self._joined(chains[last])
        first = groups[0]
        self._prompts(first)
        self._numbers(first)
        self._model(first.inputs.get("model"))
        size = self._beginning(first)
        self._second(first, groups[1:], size)
        return self.found.made(PROGRAM) if {"prompt", "steps", "seed"} & self.found.fields.keys() else None

    # Passes

    def pass_of(self, id: str, node: Node) -> Pass | None:
        """What a node does as a sampler, by its inputs, whatever its class is called; None: it is none."""
        told = dict(node.inputs)
        if self.at(told.get("latent_image")) is None and not ({"positive", "seed", "steps"} <= told.keys() or node.kind == "KSampler"):
            return None
        if guider := self.at(told.get("guider")):
            own = dict(guider[1].inputs)
            told |= {"positive": own.get("positive", own.get("conditioning")), "negative": own.get("negative"), "model": own.get("model")}
            told["cfg"] = own.get("cfg", 1.0)
        if not any(self.at(told.get(name)) for name in ("positive", "negative")):
            return None
        one = Pass(id, told)
        for name, theirs in {"steps": "steps", "guidance": "cfg", "sampler": "sampler_name", "scheduler": "scheduler"}.items():
            setattr(one, name, self.value(told.get(theirs), theirs))
        one.seed = self.value(told.get("seed", told.get("noise_seed")), "seed")
        one.strength = self.value(told.get("denoise", 1.0), "denoise")
        if noise := self.at(told.get("noise")):
            one.seed, one.fresh = self.value(noise[1].inputs.get("noise_seed"), "seed"), noise[1].kind != "DisableNoise"
        if sampler := self.at(told.get("sampler")):
            one.sampler = self.value(sampler[1].inputs.get("sampler_name", sampler[1].kind), "sampler_name")
        if sigmas := self.at(told.get("sigmas")):
            own = dict(sigmas[1].inputs)
            one.steps, one.strength = self.value(own.get("steps"), "steps"), self.value(own.get("denoise", 1.0), "denoise")
            one.scheduler = self.value(own.get("scheduler", sigmas[1].kind.removesuffix("Scheduler")), "scheduler")
        if "start_at_step" in told or "add_noise" in told:
            one.fresh = one.fresh and told.get("add_noise") not in ("disable", False)
            start, end = (self.value(told.get(name), name) for name in ("start_at_step", "end_at_step"))
            one.start = start if isinstance(start, int) and 0 < start < 10_000 else 0
            one.end = end if isinstance(end, int) and 0 < end < 10_000 else 10_000
            one.split = "start_at_step" in told
        return one

    def value(self, said: Any, name: str) -> Any:
        """A number or name, through the nodes that only hold it."""
        for _ in range(MAX_HOPS):
            if (found := self.at(said)) is None:
                return said
            inputs = found[1].inputs
            names = [one for one in (name, *VALUES) if one in inputs]
            rest = [value for value in inputs.values() if self.at(value) or isinstance(value, int | float)]
            said = inputs[names[0]] if names else rest[0] if len(rest) == 1 else None
        return None

    def _ends(self, passes: Mapping[str, Pass]) -> list[tuple[str, str, list[Node]]]:
        """Nodes that nothing follows, each with the last pass before it and what lies between; those that save come first."""
        used = {id for node in self.nodes.values() for link in node.inputs.values() for id, _ in self._linked(link)}
        found = []
        for id, _ in sorted(self.nodes.items(), key=lambda one: ("save" not in one[1].kind.lower(), one[0] not in passes)):
            if id in used:
                continue
            last, between = self._back(id, passes)
            if last in passes:
                found.append((id, last, between))
        saved = [one for one in found if "save" in self.nodes[one[0]].kind.lower()]
        # A graph in which every sampler leads back to itself has no end.
        return saved or found or [(next(iter(passes)), next(iter(passes)), [])]

    def _linked(self, link: Any) -> Iterator[tuple[str, Node]]:
        if found := self.at(link):
            yield found

    def _back(self, start: str, passes: Mapping[str, Pass], leave: bool = False) -> tuple[str, list[Node]]:
        """The nearest pass before a node, or without any the node that the picture begins with; and the nodes between, last first.

        Args:
            leave: begin with what is before the node.
        """
        parents: dict[str, str | None] = {start: None}
        waiting, leaf = [start], start
        while waiting:
            id = waiting.pop()
            if id in passes and not (leave and id == start):
                leaf = id
                break
            inputs = passes[id].inputs if id in passes else self.nodes[id].inputs
            names = [name for name in PICTURE if name in inputs]
            if not (leave and id == start):
                names += [name for name in inputs if name not in ASIDE and name not in names]
            before = [found[0] for name in names if (found := self.at(inputs[name])) and found[0] not in parents]
            parents |= dict.fromkeys(before, id)
            waiting += before[::-1]
            leaf = id if not before and leaf == start else leaf
        way: list[Node] = []
        place = parents.get(leaf)
        while place is not None and place != start:
            way.append(self.nodes[place])
            place = parents[place]
        way = way if leave or leaf == start else [*way, self.nodes[start]]
        return leaf, way[::-1]

    def _chain(self, last: str, passes: Mapping[str, Pass]) -> list[Pass]:
        """The passes that a picture went through, the first one first."""
        found, seen = [passes[last]], {last}
        while True:
            before, between = self._back(found[0].id, passes, leave=True)
            found[0].between = between + ([] if before in passes or before == found[0].id else [self.nodes[before]])
            if before not in passes or before in seen:
                return found
            seen.add(before)
            found.insert(0, passes[before])

    def _joined(self, chain: list[Pass]) -> list[Pass]:
        """The same with passes that only go on, on the same way of steps, counted as one."""
        found = [chain[0]]
        for one in chain[1:]:
            before = found[-1]
            goes_on = one.split and before.split and not one.fresh and one.start == before.end and one.steps == before.steps
            if goes_on and not any(node.kind in SCALES for node in one.between):
                if any(one.inputs.get(name) != before.inputs.get(name) for name in ("model", "positive", "negative", "cfg")):
                    self.found.lose(f"from step {one.start} on another model, prompt or guidance (node {shown(one.id)})")
                before.end = one.end
            else:
                found.append(one)
        for one in found:
            if not one.fresh:
                self.found.lose(f"node {shown(one.id)} adds no noise")
            if isinstance(one.steps, int) and one.split and one.end < one.steps:
                self.found.lose(f"node {shown(one.id)} stops at step {one.end} of {one.steps}")
            if isinstance(one.steps, int) and one.split and one.steps > 0:
                one.strength = max(0.0, 1 - one.start / one.steps)
        return found

    def _numbers(self, one: Pass) -> None:
        for name, said, theirs in (("steps", one.steps, "steps"), ("guidance", one.guidance, "cfg"), ("seed", one.seed, "seed")):
            if said is None:
                self.found.lose(f"{theirs}: cannot be told of the graph", name)
            else:
                self.found.number(name, said, theirs)
        self.found.sampler(one.sampler if one.sampler is not None else "?")
        if one.scheduler is not None and "sampler" in self.found.fields:
            self.found.spacing(one.scheduler)

    def _beginning(self, first: Pass) -> tuple[int, int] | None:
        """What the first pass starts from: an empty latent, whose size (width, height) it tells, or a picture."""
        way = first.between
        start = next(
            (node for node in reversed(way) if "width" in node.inputs and "height" in node.inputs and node.kind not in SCALES), None
        )
        picture = next((node for node in reversed(way) if "image" in node.inputs and isinstance(node.inputs["image"], str)), None)
        if picture is not None or any(node.kind.startswith("VAEEncode") for node in way):
            self.found.init(f"img2img from {shown(picture.inputs['image']) if picture else 'a picture'}")
            self.found.number("strength", first.strength, "denoise")
            if any(node.kind in MASKED for node in way):
                self.found.lose("inpainting; give its mask by --mask", "mask")
            self._of_steps(first, first.strength)
            self._unknown(node for node in way if node is not picture and node.kind not in MASKED)
            return None
        if number_of("strength", first.strength) != 1:
            self.found.lose(f"node {shown(first.id)} takes {shown(first.strength)} of the way, out of noise")
        if start is None:
            self.found.lose("size: cannot be told of the graph", "size")
            return None
        self._unknown(node for node in way if node is not start)
        sides = {name: self.value(start.inputs[name], name) for name in ("width", "height")}
        if None in sides.values():
            self.found.lose("size: cannot be told of the graph", "size")
            return None
        for name, side in sides.items():
            self.found.number(name, side, name)
        if {"width", "height"} <= self.found.fields.keys():
            return self.found.fields["width"], self.found.fields["height"]
        self.found.fields.pop("width", None), self.found.fields.pop("height", None)
        return None

    def _second(self, first: Pass, more: list[Pass], size: tuple[int, int] | None) -> None:
        """A second pass at a larger size, as hires fix has it; whatever else it is, or a third, is told."""
        for one in more[1:]:
            self.found.lose(f"a further pass (node {shown(one.id)})")
        if not more:
            return
        one, large = more[0], size
        for node in reversed(one.between):
            large = self._scaled(node, large) if node.kind in SCALES else large
        strength = number_of("hires_strength", one.strength)
        factor = large[0] / size[0] if size and large else 1.0
        fits = size and large and factor > 1 and size[1] * factor == large[1] and number_of("hires", factor) is not None
        if not fits or strength is None or large is None:
            self.found.lose(f"a second pass (node {shown(one.id)}), as its size or strength is not one of hires fix", "hires")
            return
        self.found.fields |= {"width": large[0], "height": large[1], "hires": factor, "hires_strength": strength}
        for node in one.between:
            method = node.inputs.get("upscale_method", "")
            if node.kind in SCALES and method != "lanczos":
                self.found.lose(f"enlarged by {shown(node.kind)} {shown(method)}".rstrip() + "; here by Lanczos' filter")
        self._unknown(one.between)
        self._of_steps(one, strength)
        theirs = {name: getattr(one, name) for name in ("steps", "guidance", "seed", "sampler", "scheduler")}
        other = [f"{name} {shown(said)}" for name, said in theirs.items() if said != getattr(first, name)]
        other += [name for name in ("positive", "negative", "model") if one.inputs.get(name) != first.inputs.get(name)]
        if other:
            self.found.lose(f"the second pass' own {', '.join(other)}")

    def _scaled(self, node: Node, size: tuple[int, int] | None) -> tuple[int, int] | None:
        """(width, height) after a node that scales."""
        sides = [self.value(node.inputs.get(name), name) for name in ("width", "height")]
        if all(isinstance(side, int) and not isinstance(side, bool) and 0 <= side <= 16384 for side in sides) and any(sides):
            if all(sides) or size is None:
                return (sides[0], sides[1]) if all(sides) else None
            return (sides[0] or round(size[0] * sides[1] / size[1])), (sides[1] or round(size[1] * sides[0] / size[0]))
        by = self.value(node.inputs.get("scale_by"), "scale_by")
        if node.kind == "ImageUpscaleWithModel":
            model = self.at(node.inputs.get("upscale_model"))
            name = re.search(r"(?<!\d)(\d)x|x(\d)(?!\d)", str(model[1].inputs.get("model_name", ""))[:200].lower()) if model else None
            by = int(name[1] or name[2]) if name else None
        if size is None or isinstance(by, bool) or not isinstance(by, int | float) or not 0 < by <= 16:
            return None
        return round(size[0] * by), round(size[1] * by)

    def _of_steps(self, one: Pass, strength: Any) -> None:
        """ComfyUI takes all steps within the strength, but where they are counted over the whole way."""
        part = number_of("strength", strength)
        if not one.split and part and part < 1 and isinstance(one.steps, int) and 0 < one.steps <= 1000:
            here = int(one.steps * part + 1e-9)
            self.found.lose(
                f"{plural(one.steps, 'step')} within strength {part:g}: here {here} of {one.steps} are taken; --steps chooses", "steps"
            )

    def _after(self, between: list[Node]) -> None:
        """What was done to the picture once it was drawn."""
        for node in between:
            if node.kind in SCALES:
                self.found.lose(f"{shown(node.kind)} after drawing")
            for loader in (self.at(node.inputs.get("vae")),) if node.kind.startswith("VAEDecode") else ():
                if loader and "vae_name" in loader[1].inputs:
                    self.found.lose(f"VAE {shown(loader[1].inputs['vae_name'])}; give its file by --vae", "vae")
        self._unknown(between)

    def _unknown(self, nodes: Any) -> None:
        for node in nodes:
            if node.kind not in SCALES and not PLAIN.search(node.kind):
                self.found.lose(f"node {shown(node.kind)} on the way of the picture")

    # Model

    def _model(self, link: Any) -> None:
        """LoRAs and the checkpoint, back along the model's links."""
        for _ in range(MAX_HOPS):
            if (found := self.at(link)) is None:
                return
            node, inputs = found[1], found[1].inputs
            if file := next((inputs[name] for name in ("ckpt_name", "unet_name", "model_name") if isinstance(inputs.get(name), str)), None):
                self.found.fields["model"] = re.split(r"[/\\]", file)[-1].rpartition(".")[0] or file
            if inputs.get("lora_name", "None") != "None":
                weight, text = (self.value(inputs.get(name), name) for name in ("strength_model", "strength_clip"))
                more = f" ({shown(text)} of the text encoder)" if text not in (None, weight) else ""
                self.found.lora(inputs["lora_name"], weight, more)
            stack = [one for one in inputs.values() if isinstance(one, dict) and "lora" in one]
            for one in stack:
                if one.get("on", True):
                    self.found.lora(one["lora"], one.get("strength"))
            link = inputs.get("model")
            if self.at(link) and not stack and "lora_name" not in inputs and node.kind != "Reroute":
                self.found.lose(f"node {shown(node.kind)} on the model")

    def _skip(self, link: Any) -> Any:
        """What CLIPSetLastLayer says, back along the text encoder's links; the nearest one counts."""
        for _ in range(MAX_HOPS):
            if (found := self.at(link)) is None:
                return None
            if name := next((name for name in ("stop_at_clip_layer", "clip_skip") if name in found[1].inputs), None):
                layer = self.value(found[1].inputs[name], name)
                return -layer if isinstance(layer, int) else layer
            link = found[1].inputs.get("clip")
        return None

    # Text

    def _prompts(self, one: Pass) -> None:
        for name, theirs in (("prompt", "positive"), ("negative", "negative")):
            link = one.inputs.get(theirs)
            said = self._condition(link, theirs, 0) if link is not None or name == "prompt" else ""
            if said is None:
                self.found.lose(f"{theirs} prompt: cannot be told of the graph", name)
                continue
            for word in LEARNED.findall(said):
                self.found.lose(f"learned word (textual inversion) {shown(word)}; give it by --embedding FILE", "embedding")
            if re.search(r"\bAND\b", said):
                self.found.lose("AND in the prompt, a word there, which joins prompts here")
            self.found.fields[name] = re.sub(r"(?<!\\)([\[\]])", r"\\\1", said)  # square brackets mean nothing there

    def _condition(self, link: Any, role: str, hops: int) -> str | None:
        """The text of a conditioning."""
        found = self.at(link)
        if found is None or hops > MAX_HOPS:
            return None
        id, node = found
        inputs = node.inputs
        if self.at(inputs.get("clip")) or any(isinstance(inputs.get(name), str) for name in TEXTS):
            skip = self._skip(link) if self._skip(inputs.get("clip")) is None else self._skip(inputs.get("clip"))
            if skip not in (None, 1, self.found.fields.get("clip_skip", 1)):
                self.found.number("clip_skip", skip, "stop_at_clip_layer")
            texts = [self._text(inputs[name], role, 0) for name in ("text_g", "text_l", "clip_l", "t5xxl") if name in inputs]
            if len(set(texts)) > 1:
                self.found.lose(f"node {shown(node.kind)}: different texts for its text encoders; the first is taken")
            if (led := self.value(inputs.get("guidance"), "guidance")) is not None:  # what Flux is told of it
                self.found.lose(f"node {shown(node.kind)}: guidance {shown(led)} that the network is told")
            text = texts[0] if texts and texts[0] is not None else self._of_node(id, role, 0)
            if text is not None and BREAK.search(text):
                self.found.lose("BREAK in the prompt, a word there, which begins a chunk of tokens here")
            return text
        if {"positive", "negative"} & inputs.keys():
            self._aside(node)
            chosen = {0: "positive", 1: "negative"}.get(link[1] if isinstance(link[1], int) else -1, role)
            return self._condition(inputs.get(chosen), role, hops + 1)
        if node.kind == "ConditioningZeroOut":  # whatever its text: nothing of it is left
            self._aside(node)
            return ""
        links = [value for name, value in inputs.items() if name.startswith("conditioning") and self.at(value)]
        if node.kind == "ConditioningConcat" and len(links) == 2:
            both = [self._condition(inputs.get(f"conditioning_{end}"), role, hops + 1) for end in ("to", "from")]
            return None if None in both else " BREAK ".join(map(str, both))[:MAX_PROMPT]
        if links:
            if len(links) > 1:
                self.found.lose(f"node {shown(node.kind)}: several prompts at once; the first is taken")
            elif not re.match("reroute", node.kind, re.IGNORECASE):
                self._aside(node)
            return self._condition(inputs.get("conditioning_to", links[0]), role, hops + 1)
        return self._of_node(id, role, 0)

    def _aside(self, node: Node) -> None:
        self.found.lose(f"node {shown(node.kind)} on the prompt")

    def _text(self, value: Any, role: str, hops: int) -> str | None:
        """A text that stands here, or comes from another node."""
        if isinstance(value, str):
            return value
        found = self.at(value)
        return None if found is None or hops > MAX_HOPS else self._of_node(found[0], role, hops + 1)

    def _of_node(self, id: str, role: str, hops: int) -> str | None:
        """The text that a node gives: the one that it has or is told; of nodes that join texts all of them."""
        if (id, role) not in self.said:
            self.said[id, role] = None  # until it is known: for circles
            self.said[id, role] = self._found(self.nodes[id], role, hops)
        return self.said[id, role]

    def _found(self, node: Node, role: str, hops: int) -> str | None:
        inputs = {name: value for name, value in node.inputs.items() if name not in ("clip", "model", "vae")}
        if refused := {name for name in inputs if NEGATIVE.search(name)}:  # a node that holds both texts gives each its own
            chosen = {name: value for name, value in inputs.items() if (name in refused) == (role == "negative")}
            inputs = chosen if any(name in TEXTS or name in refused for name in chosen) else inputs
        links = {name: text for name, value in inputs.items() if self.at(value) and (text := self._text(value, role, hops)) is not None}
        words = {name: value for name, value in inputs.items() if isinstance(value, str)}
        if JOINS.search(node.kind):
            between = next((words[name] for name in BETWEEN if name in words), ", " if "delimiter" in inputs else "")
            pieces = [links.get(name, words.get(name)) for name in inputs if name not in BETWEEN and (name in links or name in words)]
            pieces = [piece for piece in pieces if piece and piece not in ("true", "false", "enable", "disable")]
            joined = between.replace("\\n", "\n").join(map(str, pieces))
            return joined if len(joined) <= MAX_PROMPT else None
        named = next((links.get(name, words.get(name)) for name in TEXTS if name in links or name in words), None)
        if named is None:
            pool = list(dict.fromkeys(links.values())) or list(words.values())
            named = pool[0] if len(pool) == 1 else None
        others = [name for name in words if name not in TEXTS and not re.search("show|display|preview", node.kind, re.IGNORECASE)]
        if named is not None and ((links and others) or not HOLDS.search(node.kind) or WRITES.search(node.kind)):
            self.found.lose(f"node {shown(node.kind)} on the prompt, which is taken as it comes in")
        return named
