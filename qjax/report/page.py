"""The comparison as one self-contained HTML page: charts, a sortable table, settings of every run, what failed."""

from __future__ import annotations

import html
import json
import math
from collections.abc import Sequence

from qjax.report.runs import Run, Skipped
from qjax.report.series import limits, ticks
from qjax.report.table import comparison, number, ordered

__all__ = ["page"]

_STYLE = """:root{color-scheme:light dark;--ink:#1b1b1b;--paper:#fff;--rule:#d5d5d5;--mark:#0b5cad}
@media(prefers-color-scheme:dark){:root{--ink:#ececec;--paper:#15181c;--rule:#444b54;--mark:#7ab8ff}}
body{font:15px/1.45 system-ui,sans-serif;color:var(--ink);background:var(--paper);
margin:0 auto;
padding:1rem;max-width:90rem}
.charts{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,360px),1fr));gap:1rem}figure{margin:0}
svg{width:100%;max-width:560px}svg text{fill:currentColor;font-size:12px}.grid,.bar{stroke:var(--rule)}
.bar{stroke:var(--mark)}
circle{fill:var(--mark)}.bound{stroke:currentColor;stroke-dasharray:5 4;fill:none}.scroll{overflow-x:auto}
table{border-collapse:collapse}td,th{padding:.25rem .6rem;border-bottom:1px solid var(--rule);
white-space:nowrap;text-align:left}
th button{font:inherit;color:inherit;background:none;border:0;padding:0;cursor:pointer}
li,summary{overflow-wrap:anywhere}
pre{overflow-x:auto}a{color:var(--mark)}input{font:inherit;max-width:100%}"""
_SCRIPT = """const t=document.querySelector('table'),b=t.tBodies[0];
document.getElementById('filter').oninput=e=>{for(const r of b.rows)
r.hidden=!r.textContent.toLowerCase().includes(e.target.value.toLowerCase())};
t.querySelectorAll('th').forEach((h,i)=>h.firstChild.onclick=()=>{const up=h.getAttribute('aria-sort')!=='ascending';
t.querySelectorAll('th').forEach(o=>o.removeAttribute('aria-sort'));h.setAttribute('aria-sort',up?'ascending':'descending');
const v=r=>{const s=r.cells[i].textContent.replace('∞','Infinity'),n=parseFloat(s);return isNaN(n)?s:n};
[...b.rows].sort((p,q)=>{const x=v(p),y=v(q);return(up?1:-1)*(typeof x==='number'&&typeof y==='number'?
(x>y)-(x<y):String(x).localeCompare(String(y)))}).forEach(r=>b.append(r))});"""
_W, _H, _LEFT, _TOP, _BOTTOM = 420, 300, 62, 12, 40


def _chart(runs: Sequence[Run], key: str, title: str, *, shannon: bool = False) -> str:
    """Bits per weight against a number, logarithmic, with intervals; points lead to the settings of their run."""
    points = []
    for index, run in enumerate(runs):
        value = run.number(key)
        if value is not None and math.isfinite(value) and value > 0:
            low, high = run.interval(key) or (value, value)
            ends = (low, high) if low > 0 and math.isfinite(high) else (value, value)
            points.append((index, run, run.results["bits_per_weight"], value, ends))
    if not points:
        return ""
    left, right = min(p[2] for p in points) - 0.25, max(p[2] for p in points) + 0.25
    extra = [4.0**-left, 4.0**-right] if shannon else []
    low, high = limits([bound for p in points for bound in p[4]] + extra, 0.05)

    def x(bits: float) -> float:
        return _LEFT + (bits - left) / (right - left) * (_W - _LEFT - 10)

    def y(value: float) -> float:
        return _TOP + math.log(high / value) / math.log(high / low) * (_H - _TOP - _BOTTOM)

    parts = [f'<svg viewBox="0 0 {_W} {_H}" role="group" aria-label="{html.escape(title)}">']
    for tick in ticks(low, high):
        parts.append(f'<path class="grid" d="M{_LEFT} {y(tick):.1f}H{_W - 10}"/>')
        parts.append(f'<text x="{_LEFT - 6}" y="{y(tick) + 4:.1f}" text-anchor="end">{tick:.3g}</text>')
    for half in range(math.ceil(2 * left), math.floor(2 * right) + 1):
        parts.append(f'<text x="{x(half / 2):.1f}" y="{_H - 22}" text-anchor="middle">{half / 2:g}</text>')
    parts.append(f'<text x="{(_W + _LEFT) / 2}" y="{_H - 5}" text-anchor="middle">bits per weight</text>')
    if shannon:
        parts.append(f'<path class="bound" d="M{x(left):.1f} {y(extra[0]):.1f}L{x(right):.1f} {y(extra[1]):.1f}"/>')
    for index, run, bits, value, (below, above) in points:
        label = html.escape(f"{run.name}: {bits:.3f} bits, {number(value)} [{number(below)}, {number(above)}]")
        parts.append(
            f'<a href="#run-{index}" aria-label="{label}"><title>{label}</title>'
            f'<path class="bar" d="M{x(bits):.1f} {y(below):.1f}V{y(above):.1f}"/>'
            f'<circle cx="{x(bits):.1f}" cy="{y(value):.1f}" r="4" data-value="{value!r}"/></a>'
        )
    return f"<figure><figcaption>{html.escape(title)}</figcaption>{''.join(parts)}</svg></figure>"


def page(runs: Sequence[Run], skipped: Sequence[Skipped]) -> str:
    """The whole page as text; names and settings are escaped, and nothing is loaded from elsewhere."""
    runs = ordered(runs)
    table = comparison(runs)
    charts = [
        _chart(runs, "kl_mean", "KL(original ‖ quantised), nats per token, 95% intervals"),
        _chart(runs, "perplexity", "perplexity, 95% intervals"),
        _chart(runs, "weight_mse_mean", "mean of ‖E‖² / ‖W‖², dashed: Shannon bound 2^(−2R)", shannon=True),
    ]
    head = "".join(f'<th scope="col"><button>{html.escape(name)}</button></th>' for name in table.headers)
    rows = "".join("<tr>" + "".join(f"<td>{html.escape(c)}</td>" for c in row) + "</tr>" for row in table.rows)
    details = "".join(
        f'<details id="run-{index}"><summary>{html.escape(run.name)}</summary><pre>'
        f"{html.escape(json.dumps(dict(run.settings), indent=1, ensure_ascii=False, default=str))}</pre></details>"
        for index, run in enumerate(runs)
    )
    lost = "".join(f"<li>{html.escape(f'{item.path}: {item.reason}')}</li>" for item in skipped)
    return (
        '<!DOCTYPE html><html lang="en"><head><meta charset="utf-8"><title>Comparison of runs</title>'
        '<meta name="viewport" content="width=device-width"><meta http-equiv="Content-Security-Policy" '
        "content=\"default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'\">"
        f"<style>{_STYLE}</style></head><body><main><h1>Comparison of runs</h1>"
        f"<p>{len(runs)} finished, {len(skipped)} unfinished or failed</p>"
        + (f"<h2>Unfinished or failed</h2><ul>{lost}</ul>" if lost else "")
        + f'<div class="charts">{"".join(charts)}</div><h2>Runs</h2><label>Filter <input id="filter"></label>'
        f'<div class="scroll" tabindex="0" role="region" aria-label="table of runs"><table><thead><tr>{head}</tr>'
        f"</thead><tbody>{rows}</tbody></table></div><h2>Settings</h2>{details}</main>"
        f"<script>{_SCRIPT}</script></body></html>\n"
    )
