"""The demo verb: a page to draw on, in a browser on this machine, or for whoever has the token."""

from __future__ import annotations

import ipaddress
import logging
import os
import shutil
import socket
import sys
import tempfile
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING

from ldm.cli.command import call
from ldm.cli.models import device_for, model_for, name_of, tell
from ldm.config.errors import UserError
from ldm.config.options import Given, option
from ldm.sampling.adapters import weighted
from ldm.sampling.request import Adapters, Device

if TYPE_CHECKING:
    from ldm.demo.catalogue import Catalogue
    from ldm.demo.guard import Guard
    from ldm.demo.studio import Studio
    from ldm.families.draws import Draws

LEAST_TOKEN = 12  # characters
CONNECTIONS = 512
END_S = 1.5  # from Ctrl+C to the end at the latest
MISSING = "demo: gradio is not installed; python -m pip install gradio"


def main(words: Sequence[str]) -> int:
    """`ldm demo MODEL`: the exit code."""
    return call(demo, words, "ldm demo")


@dataclass(frozen=True, kw_only=True)
class Door:
    """Page: the model, where it listens, and who may come in."""

    model: str = option(
        "", "A folder or file of a model, or owner/name on the hub; default: newest of runs/*.", argument=True, given=Given.MODEL
    )
    host: str = option("127.0.0.1", "The address to listen on; any but this machine's own needs a token.")
    port: int = option(7860, "0: any that is free.", low=0, high=65535)
    token: str = option("", "What visitors must show; better set in the environment.", variable="LDM_DEMO_TOKEN")
    precision: str = option("", "Precision: fp32 bf16 fp16; default: the model's.")
    largest: int = option(1024, "px: the longest side that may be asked for.", low=8, high=8192, name="--max-size")
    low_memory: bool = option(False, "One part of the model in memory at a time; no previews.")
    models: tuple[Path, ...] = option((), "A folder of models to choose from, besides runs/*; may be repeated.")
    lora_dir: tuple[Path, ...] = option((), "A folder of LoRAs to choose from, besides runs/*/lora; may be repeated.")
    vae_dir: tuple[Path, ...] = option((), "A folder of autoencoders to choose from; may be repeated.")
    keep: int = option(1, "Models that stay in memory; another one takes the place of the one unused for longest.", low=1)
    gallery: Path = option(Path("outputs/demo"), "A folder where pictures stay, each user's in one of their own.")
    no_gallery: bool = option(False, "No picture stays when the page ends.")

    @property
    def stays(self) -> Path | None:
        """Where pictures stay; None: nowhere."""
        return None if self.no_gallery else self.gallery


def demo(door: Door, adapters: Adapters, device: Device) -> int:
    """Open a page to draw on with a model. Every picture is the one that `ldm sample` draws with the same settings."""
    check_door(door.host, door.token)
    adapters.check(door.low_memory, {})
    quiet()
    try:
        import gradio  # noqa: F401  # at once, before the model takes its time
        import uvicorn
    except ImportError as error:
        raise UserError(MISSING if error.name in ("gradio", "uvicorn") else f"{MISSING} ({error})") from None
    for name, folders in (("models", door.models), ("lora_dir", door.lora_dir), ("vae_dir", door.vae_dir)):
        for one in folders:
            if not one.is_dir():
                raise UserError(f"{name}: {one} is not a folder; give the one that they are in")
    folder = model_for(door.model)
    listener = listen(door.host, door.port)
    from ldm.demo.studio import Studio

    catalogue = catalogue_of(folder, door, adapters, device)
    with tempfile.TemporaryDirectory(prefix="ldm-demo-") as files, listener:
        first = catalogue.opened(catalogue.chosen("", (), ""))
        with Studio(first.family, previews=not door.low_memory) as studio:
            guard = application(
                studio,
                Path(files),
                name_of(folder),
                token=door.token or None,
                largest=door.largest,
                precision=door.precision,
                added=dict(first.added),
                catalogue=catalogue,
                gallery=door.stays,
            )
            shown = f"[{door.host}]" if ":" in door.host else door.host
            print(f"http://{shown}:{listener.getsockname()[1]}/ (Ctrl+C ends it)", file=sys.stderr, flush=True)

            class _Server(uvicorn.Server):
                def handle_exit(self, sig: int, frame: FrameType | None) -> None:
                    """Ctrl+C: what is being drawn may take minutes, and nobody waits for it."""
                    _end_soon(files)
                    logging.getLogger("uvicorn.error").setLevel(logging.CRITICAL)  # of streams that are cut off
                    super().handle_exit(sig, frame)

            config = uvicorn.Config(
                guard,
                log_level="warning",
                access_log=False,
                limit_concurrency=CONNECTIONS,
                timeout_graceful_shutdown=1,
                server_header=False,
                timeout_keep_alive=30,
                ws="none",
            )
            _Server(config).run(sockets=[listener])
    return 0


def _end_soon(files: str) -> None:
    """End the process in a few seconds, whatever its threads do; what was drawn is deleted as it would be anyway."""

    def end() -> None:
        print("ldm demo: interrupted", file=sys.stderr, flush=True)
        shutil.rmtree(files, ignore_errors=True)
        os._exit(130)

    timer = threading.Timer(END_S, end)
    timer.daemon = True
    timer.start()


def check_door(host: str, token: str) -> None:
    """Refuse to listen to other machines without a token, and tokens that are soon guessed.

    Raises:
        UserError: saying so.
    """
    try:
        own = host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        own = False
    if not own and not token:
        raise UserError(f"host: {host} lets other machines in; give --token, or LDM_DEMO_TOKEN in the environment")
    if token and (len(token) < LEAST_TOKEN or not token.isascii() or not token.isprintable()):
        raise UserError(f"token: at least {LEAST_TOKEN} printable ASCII characters are needed")


def listen(host: str, port: int) -> socket.socket:
    """A listening socket.

    Raises:
        UserError: if the address is not this machine's, or the port is taken.
    """
    try:
        family, kind, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        made = socket.socket(family, kind)
        made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        made.bind(address)
        made.listen(128)
        return made
    except OSError as error:
        raise UserError(f"port: {host}:{port}: {error.strerror or error}; choose another --port, or 0 for any that is free") from None


def quiet() -> None:
    """No analytics, no look-ups of versions, no hub: set before gradio is imported."""
    os.environ.update(GRADIO_ANALYTICS_ENABLED="False", HF_HUB_DISABLE_TELEMETRY="1", GRADIO_RUN_HISTORY="False", GRADIO_SSR_MODE="False")
    os.environ.update(GRADIO_MCP_SERVER="False", GRADIO_SHARE="False", GRADIO_NUM_PORTS="1")


def catalogue_of(folder: str, door: Door, adapters: Adapters, device: Device) -> Catalogue:
    """What can be chosen, and how it is opened."""
    from ldm.demo.catalogue import Catalogue, Opened, Outfit

    def open(outfit: Outfit) -> Opened:
        from ldm.families.draws import Running, Wanted
        from ldm.families.registry import open_finished
        from ldm.sampling.adapters import add, decoded_by

        place, vae = outfit.model, Path(outfit.vae) if outfit.vae else adapters.vae
        family = open_finished(place, device_for(device.device), door.low_memory)
        added = add(family, (*adapters.lora, *outfit.loras), adapters.embedding, {}, tell) | decoded_by(family, vae, {}, tell)
        family.ready(Path(place), Running(low_memory=door.low_memory), family.settings(Wanted(precision=door.precision)).precision)
        return Opened(family, added, examples_of(place, family))

    return Catalogue(
        (name_of(folder), folder),
        open,
        models=door.models,
        loras=door.lora_dir,
        vaes=door.vae_dir,
        given=frozenset(Path(weighted(word)[0]).stem for word in adapters.lora),
        kept=door.keep,
    )


def examples_of(folder: str, family: Draws) -> tuple[str, ...]:
    """Prompts that a model was taught, as far as its record tells any, of words that it knows."""
    from ldm.formats.model_folder import read_record, root_of

    story = read_record(root_of(folder)).get("story", {})
    told = [text for text in (story.get("prompt"), *(story.get("examples") or [])) if isinstance(text, str)]
    return tuple(text for text in dict.fromkeys(told) if text.strip() and not family.unknown(text))


def application(
    studio: Studio,
    files: Path,
    model: str,
    *,
    token: str | None = None,
    largest: int = 1024,
    precision: str = "",
    added: dict[str, str] | None = None,
    catalogue: Catalogue | None = None,
    gallery: Path | None = None,
) -> Guard:
    """The page behind its guard, as an ASGI application.

    Args:
        files: an empty folder for uploads and results.
        model: its name.
        token: that visitors must show; None: nobody must.
        largest: px, of a side.
        precision: of the networks' weights; empty: the model's own.
        added: what recipes tell of the model's LoRAs and words, as `ldm.sampling.adapters.add` gives it.
        catalogue: what can be chosen; None: the studio's model alone.
        gallery: where pictures stay; None: nowhere.
    """
    quiet()
    os.environ["GRADIO_TEMP_DIR"] = str(files.resolve())
    import gradio
    from fastapi import FastAPI

    from ldm.demo.files import Shelf
    from ldm.demo.guard import Guard
    from ldm.demo.layout import build
    from ldm.demo.orders import MAX_BYTES, MAX_PIXELS
    from ldm.demo.page import Page
    from ldm.demo.routes import add_routes
    from ldm.demo.status import CSS, head

    page = Page(studio, Shelf(files.resolve(), gallery=gallery), model, largest, precision, added or {}, catalogue)
    blocks = build(page)
    blocks.has_launched = True  # gradio looks where a client's files lie only after its own launch()
    fonts = [gradio.themes.Font(name) for name in ("system-ui", "-apple-system", "Segoe UI", "sans-serif")]
    mono = [gradio.themes.Font(name) for name in ("ui-monospace", "Consolas", "monospace")]
    theme = gradio.themes.Soft(primary_hue="indigo", neutral_hue="slate", radius_size="md", spacing_size="sm", font=fonts, font_mono=mono)
    theme.set(
        block_title_background_fill="transparent",
        block_title_background_fill_dark="transparent",
        block_title_padding="0",
        block_title_text_color="*body_text_color",
        block_title_text_color_dark="*body_text_color",
        block_title_text_weight="500",
        block_label_background_fill="transparent",
        block_label_background_fill_dark="transparent",
        block_shadow="none",
        block_border_width="1px",
        input_border_width="1px",
        input_border_color="*neutral_300",
        input_border_color_dark="*neutral_600",
        input_shadow="none",
        checkbox_border_color="*neutral_400",
        checkbox_border_color_dark="*neutral_400",
        button_primary_background_fill="*primary_600",
        button_primary_background_fill_hover="*primary_700",
    )
    functions = {number: len(function.inputs) for number, function in blocks.fns.items()}
    outer = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)
    add_routes(outer, page)  # before gradio's, which answer to every path
    gradio.mount_gradio_app(
        outer,
        blocks,
        path="/",
        footer_links=[],
        show_error=False,
        max_file_size=MAX_BYTES,
        ssr_mode=False,
        enable_monitoring=False,
        pwa=False,
        mcp_server=False,
        theme=theme,
        css=CSS,
        head=head(),
    )
    return Guard(outer, files, token, largest=2 * MAX_BYTES, pixels=max(MAX_PIXELS, largest**2), functions=functions)
