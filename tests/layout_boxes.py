"""A browser, and what of a page in it is clipped, sticks out, or lies over something else, by the boxes of its layout."""

from __future__ import annotations

import importlib.util
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

FLAGS = (
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
)
WIDTHS = (1280, 390)  # px: a desk and a phone
SCRIPT = """() => {
  const found = [], boxes = [], wide = document.documentElement.clientWidth
  if (document.documentElement.scrollWidth > wide) found.push(`the page is ${document.documentElement.scrollWidth} px wide`)
  const shown = e => e.checkVisibility({checkOpacity: true, checkVisibilityCSS: true})
  const add = (kind, e, r, text) => { if (r.width > 1 && r.height > 1) boxes.push({kind, e, r, text}) }
  const walk = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT)
  while (walk.nextNode()) {
    const e = walk.currentNode.parentElement, text = walk.currentNode.textContent.trim()
    if (!text || ["SCRIPT", "STYLE", "OPTION"].includes(e.tagName) || !shown(e)) continue
    const range = document.createRange()
    range.selectNodeContents(walk.currentNode)
    for (const r of range.getClientRects()) add("text", e, r, text.slice(0, 40))
  }
  for (const e of document.querySelectorAll("svg, input:not([type=range]), textarea, select")) {
    if (shown(e) && !e.parentElement.closest("svg")) add(e.tagName === "svg" ? "icon" : "field", e, e.getBoundingClientRect(), e.tagName)
  }
  const clipped = b => {
    for (let up = b.e; up; up = up.parentElement) {
      const style = getComputedStyle(up), side = up.getBoundingClientRect()
      if (["auto", "scroll"].includes(style.overflowX) || style.textOverflow === "ellipsis") return false
      if (style.position === "fixed") return false
      if (["hidden", "clip"].includes(style.overflowX) && (b.r.right > side.right + 1 || b.r.left < side.left - 1)) return true
    }
    return b.r.right > wide + 1 || b.r.left < -1
  }
  const scrolled = b => { // what a scrolling ancestor does not show lies over nothing
    for (let up = b.e.parentElement; up; up = up.parentElement) {
      const side = up.getBoundingClientRect(), style = getComputedStyle(up)
      if (style.overflowX === "visible" && style.overflowY === "visible") continue
      if (b.r.left >= side.right || b.r.right <= side.left || b.r.top >= side.bottom || b.r.bottom <= side.top) return true
    }
    return false
  }
  const shownOf = b => { // what the ancestors that cut off leave of a box
    let {left, right, top, bottom} = b.r
    for (let up = b.e; up; up = up.parentElement) {
      const style = getComputedStyle(up), side = up.getBoundingClientRect()
      if (style.overflowX !== "visible") [left, right] = [Math.max(left, side.left), Math.min(right, side.right)]
      if (style.overflowY !== "visible") [top, bottom] = [Math.max(top, side.top), Math.min(bottom, side.bottom)]
    }
    return {left, right, top, bottom}
  }
  const seen = boxes.filter(b => !scrolled(b))
  for (const b of seen) if (b.kind !== "icon" && clipped(b)) found.push(`clipped: ${b.text}`)
  const parts = seen.map(shownOf)
  for (let i = 0; i < seen.length; i++) for (let j = i + 1; j < seen.length; j++) {
    const a = seen[i], b = seen[j]
    if (a.e.contains(b.e) || b.e.contains(a.e)) continue
    if (new Set([a.kind, b.kind]).has("icon") && new Set([a.kind, b.kind]).has("field")) continue // an arrow in a chooser
    const [drawing, other] = [a.e.closest("svg"), b.e.closest("svg")]
    if (drawing && (drawing === other || (a.kind === "icon" && b.kind === "icon"))) continue
    const [first, second] = [parts[i], parts[j]]
    const across = Math.min(first.right, second.right) - Math.max(first.left, second.left)
    const down = Math.min(first.bottom, second.bottom) - Math.max(first.top, second.top)
    if (across > 3 && down > 5) found.push(`${a.text} over ${b.text}`)
  }
  return [...new Set(found)]
}"""


def chromium() -> str | None:
    """Where the browser is; None: nowhere."""
    return next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


@contextmanager
def opened() -> Iterator[Any]:
    """A browser; without one the test is skipped."""
    if chromium() is None or importlib.util.find_spec("playwright") is None:
        pytest.skip("browser tests need chromium and playwright")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium(), args=list(FLAGS))
        yield browser
        browser.close()


def problems(page: Any) -> list[str]:
    """What is wrong at each width, in light and in dark; nothing: []."""
    before, found = page.viewport_size, []
    for width in WIDTHS:
        page.set_viewport_size({"width": width, "height": 900})
        for scheme in ("light", "dark"):
            page.emulate_media(color_scheme=scheme)
            page.wait_for_timeout(500)
            found += [f"{width} px, {scheme}: {said}" for said in page.evaluate(SCRIPT)]
    page.emulate_media(color_scheme="light")
    page.set_viewport_size(before)
    return found
