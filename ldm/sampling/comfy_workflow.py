"""ComfyUI's two ways to write a graph, as one: what was run (`prompt`), and what its editor shows (`workflow`)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

BYPASSED, MUTED = 4, 2  # a node's mode in the editor
# The editor keeps widgets' values without names, in this order; None: what belongs to the editor alone.
WIDGETS: dict[str, tuple[str | None, ...]] = {
    "KSampler": ("seed", None, "steps", "cfg", "sampler_name", "scheduler", "denoise"),
    "KSamplerAdvanced": (
        *("add_noise", "noise_seed", None, "steps", "cfg", "sampler_name", "scheduler"),
        *("start_at_step", "end_at_step", "return_with_leftover_noise"),
    ),
    "SamplerCustom": ("add_noise", "noise_seed", None, "cfg"),
    "KSamplerSelect": ("sampler_name",),
    "BasicScheduler": ("scheduler", "steps", "denoise"),
    "RandomNoise": ("noise_seed", None),
    "CFGGuider": ("cfg",),
    "CLIPTextEncode": ("text",),
    "CLIPSetLastLayer": ("stop_at_clip_layer",),
    "CheckpointLoaderSimple": ("ckpt_name",),
    "UNETLoader": ("unet_name", "weight_dtype"),
    "LoraLoader": ("lora_name", "strength_model", "strength_clip"),
    "LoraLoaderModelOnly": ("lora_name", "strength_model"),
    "VAELoader": ("vae_name",),
    "EmptyLatentImage": ("width", "height", "batch_size"),
    "EmptySD3LatentImage": ("width", "height", "batch_size"),
    "LatentUpscale": ("upscale_method", "width", "height", "crop"),
    "LatentUpscaleBy": ("upscale_method", "scale_by"),
    "ImageScale": ("upscale_method", "width", "height", "crop"),
    "ImageScaleBy": ("upscale_method", "scale_by"),
    "UpscaleModelLoader": ("model_name",),
    "LoadImage": ("image", None),
    "ConditioningAverage": ("conditioning_to_strength",),
    "StringConcatenate": ("string_a", "string_b", "delimiter"),
}


def nodes_of(graph: Any) -> dict[str, tuple[str, dict[str, Any]]]:
    """Class and inputs of every node, by its number; whatever is no node is left out."""
    if not isinstance(graph, dict):
        return {}
    if isinstance(graph.get("nodes"), list):
        return _drawn(graph)
    return {
        str(id): (node["class_type"], node["inputs"])
        for id, node in graph.items()
        if isinstance(node, dict) and isinstance(node.get("class_type"), str) and isinstance(node.get("inputs"), dict)
    }


def _drawn(graph: Mapping[str, Any]) -> dict[str, tuple[str, dict[str, Any]]]:
    """The same of the editor's form; muted nodes are left out, and bypassed ones hand on what they are given."""
    nodes = {one["id"]: one for one in graph["nodes"] if isinstance(one, dict) and isinstance(one.get("id"), int | str)}
    links: dict[Any, tuple[Any, Any, Any]] = {}  # by their number: from which node, at which output, of which type
    for link in graph["links"] if isinstance(graph.get("links"), list) else []:
        if isinstance(link, list) and len(link) >= 6 and all(isinstance(value, int | str) for value in link[:6]):
            links[link[0]] = (link[1], link[2], link[5])

    def source(number: Any) -> list[Any] | None:
        for _ in range(len(nodes) + 1):
            if not isinstance(number, int | str) or number not in links or links[number][0] not in nodes:
                return None
            node, slot, kind = links[number]
            if nodes[node].get("mode") != BYPASSED:
                return None if nodes[node].get("mode") == MUTED else [str(node), slot]
            number = next((one.get("link") for one in _inputs(nodes[node]) if one.get("type") == kind), None)
        return None

    found = {}
    for id, node in nodes.items():
        if node.get("mode") in (BYPASSED, MUTED) or not isinstance(kind := node.get("type"), str):
            continue
        told: dict[str, Any] = _values(kind, node)
        for one in _inputs(node):
            if isinstance(name := one.get("name"), str) and one.get("link") is not None and (link := source(one["link"])):
                told[name] = link
        found[str(id)] = (kind, told)
    return found


def _inputs(node: Mapping[str, Any]) -> list[dict[str, Any]]:
    inputs = node.get("inputs")
    return [one for one in inputs if isinstance(one, dict)] if isinstance(inputs, list) else []


def _values(kind: str, node: Mapping[str, Any]) -> dict[str, Any]:
    """A node's widgets by their names; of classes that are not known a single text is `text`."""
    values = node.get("widgets_values")
    if isinstance(values, dict):
        return {str(name): value for name, value in values.items() if not isinstance(value, list)}
    if not isinstance(values, list):
        return {}
    if kind in WIDGETS:
        return {name: value for name, value in zip(WIDGETS[kind], values, strict=False) if name and not isinstance(value, list)}
    texts = [value for value in values if isinstance(value, str)]
    numbers = [value for value in values if isinstance(value, int | float) and not isinstance(value, bool)]
    return {"text": texts[0]} if len(texts) == 1 and not numbers else {"value": values[0]} if kind == "PrimitiveNode" and values else {}
