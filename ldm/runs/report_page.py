"""HTML page of a report: style, script and pictures inline, no network."""

from __future__ import annotations

import base64
import re
from collections.abc import Iterable, Sequence
from html import escape
from io import BytesIO
from itertools import count
from pathlib import Path

STYLE = """
:root{--ground:#fbfbfa;--panel:#fff;--ink:#1d2328;--soft:#667079;--line:#e3e5e7;--mark:#2f6fc9;--good:#1f8a5b;--bad:#b8462f;--tint:#3b7dd822}
@media(prefers-color-scheme:dark){:root{--ground:#15181b;--panel:#1d2125;--ink:#e4e7ea;--soft:#98a2ab;--line:#30363c;--mark:#7fb0f5;
--good:#54c08e;--bad:#ef8a72;--tint:#6aa2f033}}
*{box-sizing:border-box}html{color-scheme:light dark;scroll-behavior:smooth}
body{margin:0;background:var(--ground);color:var(--ink);font:15px/1.5 system-ui,-apple-system,"Segoe UI",Roboto,sans-serif}
main,header>div,nav>div{max-width:1080px;margin:0 auto;padding:0 20px}
header{padding:34px 0 18px}h1{font-size:28px;line-height:1.2;margin:0 0 4px;overflow-wrap:anywhere}
h2{font-size:20px;margin:44px 0 12px}h3{font-size:15px;margin:22px 0 8px}p{margin:8px 0}
.soft,figcaption,.note{color:var(--soft)}.note{font-size:13px}
nav{position:sticky;top:0;background:var(--ground);border-bottom:1px solid var(--line);z-index:1}
nav a{display:inline-block;padding:9px 14px 9px 0;color:var(--soft);text-decoration:none;font-size:14px}nav a:hover{color:var(--mark)}
.tiles{display:grid;grid-template-columns:repeat(auto-fill,minmax(155px,1fr));gap:10px;margin-top:18px}
.tile,.panel{background:var(--panel);border:1px solid var(--line);border-radius:10px;padding:12px 14px}
.tile b{display:block;font-size:21px;white-space:nowrap;line-height:1.25;font-weight:650;font-variant-numeric:tabular-nums}
.tile span{color:var(--soft);font-size:13px}
.panel{overflow-x:auto;margin:10px 0}
.curves{display:grid;grid-template-columns:repeat(auto-fill,minmax(250px,1fr));gap:10px}
.curves figure{background:var(--panel);border:1px solid var(--line);border-radius:10px;padding:9px 10px 4px}
figure{margin:0}figcaption{font-size:13px}.curves svg{display:block}
table{border-collapse:collapse;width:100%;font-variant-numeric:tabular-nums}
th,td{text-align:right;padding:5px 9px;border-bottom:1px solid var(--line);white-space:nowrap}tr:last-child td{border-bottom:0}
th{font-weight:600;color:var(--soft);font-size:13px}th:first-child,td:first-child,.words td,.words th{text-align:left}
td small{color:var(--soft);display:block;font-size:11.5px;line-height:1.1}
.bar{background:linear-gradient(90deg,var(--tint) var(--share),transparent var(--share))}
.good{color:var(--good)}.bad{color:var(--bad)}
.row{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,330px),1fr));gap:12px;align-items:start}
.pixels{image-rendering:crisp-edges;image-rendering:pixelated}
img{max-width:100%;border-radius:6px;display:block;background:#fff}.row figure{min-width:0}
.slides input{width:min(100%,520px);accent-color:var(--mark);display:block;margin:0 0 8px}
details{margin:10px 0}summary{cursor:pointer;color:var(--mark);font-size:14px}
pre{background:var(--panel);border:1px solid var(--line);border-radius:8px;padding:11px 13px;overflow:auto;max-height:520px;
font:13px/1.5 ui-monospace,SFMono-Regular,Menlo,Consolas,monospace;margin:8px 0}
ol.prompts{columns:2;font-size:13px;color:var(--soft);padding-left:26px;margin:8px 0}
@media(max-width:640px){ol.prompts{columns:1}}@media print{nav{position:static}details{display:block}}
"""

# Without it every checkpoint's picture is shown, row by row: nothing is lost.
SCRIPT = """
for(const box of document.querySelectorAll('.slides')){const all=[...box.querySelectorAll('figure')];if(all.length<2)continue;
const bar=document.createElement('input');bar.type='range';bar.min=0;bar.max=all.length-1;bar.value=bar.max;
bar.setAttribute('aria-label','checkpoint');const show=()=>all.forEach((f,i)=>f.hidden=i!=bar.value);
bar.oninput=show;box.className='slides';box.prepend(bar);show()}
"""


def page(title: str, header: str, sections: Iterable[tuple[str, str, str]]) -> str:
    """The whole page: a header and sections (name in the address, heading, content); empty sections are left out."""
    shown = [section for section in sections if section[2]]
    links = "".join(f'<a href="#{name}">{escape(heading)}</a>' for name, heading, _ in shown)
    body = "".join(f'<section id="{name}"><h2>{escape(heading)}</h2>{apart(content, name)}</section>' for name, heading, content in shown)
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{escape(title)}</title>'
        f'<meta name="viewport" content="width=device-width,initial-scale=1"><link rel="icon" href="data:,"><style>{STYLE}</style></head>'
        f"<body><header><div>{header}</div></header><nav><div>{links}</div></nav><main>{body}<p>&nbsp;</p></main>"
        f"<script>{SCRIPT}</script></body></html>\n"
    )


def apart(content: str, name: str) -> str:
    """HTML whose drawings have names of their own: those that `matplotlib` gives meet where drawings are alike."""
    counter = count(1)

    def own(drawing: re.Match[str]) -> str:
        prefix = f"{name}-{next(counter)}-"
        return re.sub(r'(\bid="|href="#|url\(#)', rf"\g<1>{prefix}", drawing[0])

    return re.sub(r"<svg.*?</svg>", own, content, flags=re.DOTALL)


def table(columns: Sequence[str], rows: Iterable[Sequence[str]], *, words: bool = False) -> str:
    """A table of cells that are HTML already; a cell may bring its own <td>."""
    head = "".join(f"<th>{column}</th>" for column in columns)
    body = "".join(f"<tr>{''.join(c if c.startswith('<td') else f'<td>{c}</td>' for c in row)}</tr>" for row in rows)
    kind = ' class="words"' if words else ""
    return f'<div class="panel"><table{kind}><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>' if body else ""


def share_cell(value: float, below: str = "") -> str:
    """A cell for a share in [0,1] with a bar behind it, and a smaller line below."""
    small = f"<small>{below}</small>" if below else ""
    return f'<td class="bar" style="--share:{100 * min(max(value, 0), 1):.1f}%">{value:.3f}{small}</td>'


def tiles(values: Iterable[tuple[str, str, str]]) -> str:
    """Headline figures (figure, its interval or nothing, what it is)."""
    shown = "".join(
        f'<div class="tile"><b>{escape(value)}</b><span>{escape(name)}{f"<br>{escape(within)}" if within else ""}</span></div>'
        for value, within, name in values
    )
    return f'<div class="tiles">{shown}</div>' if shown else ""


def figure(content: str, caption: str) -> str:
    """A drawing or picture with its caption (plain text)."""
    return f"<figure><figcaption>{escape(caption)}</figcaption>{content}</figure>"


def folded(summary: str, content: str) -> str:
    """Content that opens on a click."""
    return f"<details><summary>{escape(summary)}</summary>{content}</details>" if content else ""


def prompt_list(prompts: Sequence[str]) -> str:
    """The prompts of a grid, in its order."""
    return f'<ol class="prompts">{"".join(f"<li>{escape(text)}</li>" for text in prompts)}</ol>' if prompts else ""


def picture(path: Path, budget: int, wide: int = 820) -> str | None:
    """An <img> that carries the picture in at most `budget` bytes; None where the file is no picture.

    The file's own bytes where they fit; else JPEG, smaller until it fits. A small picture is shown larger, up to `wide` px.
    """
    from PIL import Image

    try:
        data = path.read_bytes()
        with Image.open(BytesIO(data)) as opened:
            width, height = opened.size
            kind = (opened.format or "").lower()
            image = opened.convert("RGB")
    except Exception:  # a damaged file must not cost the report; Pillow raises many kinds
        return None
    if len(data) > budget or kind not in ("png", "jpeg"):
        kind = "jpeg"
        for side, quality in ((1600, 88), (1200, 80), (900, 70), (600, 60), (300, 50)):
            small = image.copy()
            small.thumbnail((side, side), Image.Resampling.LANCZOS)
            target = BytesIO()
            small.save(target, format="JPEG", quality=quality, optimize=True)
            data = target.getvalue()
            if len(data) <= budget:
                break
    times = max(1, min(3, wide // width))  # whole multiples, with the pixels as they are
    shape = f'width="{width * times}" height="{height * times}" style="height:auto"{" class=pixels" if times > 1 else ""}'
    return f'<img {shape} alt="" src="data:image/{kind};base64,{base64.b64encode(data).decode()}">'
