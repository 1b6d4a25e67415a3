"""The comparison as one self-contained HTML page: figure, charts, sortable table, settings of every run, failures."""

from __future__ import annotations

import html
import json
from collections.abc import Sequence

from qjax.report.charts import bars, heat_map, layer_losses
from qjax.report.inline import figure
from qjax.report.runs import Run, Skipped
from qjax.report.table import comparison, ordered

__all__ = ["page"]

_STYLE = """:root{color-scheme:light dark;--ink:#1b1b1b;--paper:#fff;--rule:#d5d5d5;--mark:#0b5cad}
@media(prefers-color-scheme:dark){:root{--ink:#ececec;--paper:#15181c;--rule:#444b54;--mark:#7ab8ff}}
body{font:15px/1.45 system-ui,sans-serif;color:var(--ink);background:var(--paper);
margin:0 auto;padding:1rem;max-width:90rem}
.scroll{overflow-x:auto}figure{margin:0}figure svg{width:100%;min-width:60rem}
.heat text{fill:currentColor;font-size:10px}.heat rect{fill:var(--mark)}
table{border-collapse:collapse}td,th{padding:.25rem .6rem;border-bottom:1px solid var(--rule);
white-space:nowrap;text-align:left}.bars th{font-weight:400}
.track span{display:flex;width:14rem;height:.8rem}.track i{background:var(--mark);height:100%}
th button{font:inherit;color:inherit;background:none;border:0;padding:0;cursor:pointer}
li,summary{overflow-wrap:anywhere}
pre{overflow-x:auto}a{color:var(--mark)}input{font:inherit;max-width:100%}"""
_SCRIPT = """const t=document.getElementById('runs'),b=t.tBodies[0];
document.getElementById('filter').oninput=e=>{for(const r of b.rows)
r.hidden=!r.textContent.toLowerCase().includes(e.target.value.toLowerCase())};
t.querySelectorAll('th').forEach((h,i)=>h.firstChild.onclick=()=>{const up=h.getAttribute('aria-sort')!=='ascending';
t.querySelectorAll('th').forEach(o=>o.removeAttribute('aria-sort'));h.setAttribute('aria-sort',up?'ascending':'descending');
const v=r=>{const s=r.cells[i].textContent.replace('∞','Infinity'),n=parseFloat(s);return isNaN(n)?s:n};
[...b.rows].sort((p,q)=>{const x=v(p),y=v(q);return(up?1:-1)*(typeof x==='number'&&typeof y==='number'?
(x>y)-(x<y):String(x).localeCompare(String(y)))}).forEach(r=>b.append(r))});"""


def page(runs: Sequence[Run], skipped: Sequence[Skipped]) -> str:
    """The whole page as text; names and settings are escaped, and nothing is loaded from elsewhere."""
    if not runs:
        return _document(f"<p>0 finished, {len(skipped)} unfinished or failed</p>{_lost(skipped)}", "")
    runs = ordered(runs)
    table = comparison(runs)
    losses = [layer_losses(run.path) for run in runs]
    seen = sorted(value for own in losses for row in own.values() for value in row.values() if value > 0)
    low, high = (seen[len(seen) // 50], seen[-1 - len(seen) // 50]) if seen else (0.0, 0.0)  # outliers take no contrast
    maps = "".join(
        f"<details{' open' if index == 0 else ''}><summary>{html.escape(run.name)}</summary>"
        '<div class="scroll" tabindex="0" role="region" aria-label="layers">'
        f"{heat_map(own, low, high)}</div>"
        "</details>"
        for index, (run, own) in enumerate(zip(runs, losses, strict=True))
        if own and seen
    )
    order = [0, *(i for i, right in enumerate(table.numeric) if right)]  # the results before the settings
    order += [i for i in range(len(table.headers)) if i not in order]
    head = "".join(f'<th scope="col"><button>{html.escape(table.headers[i])}</button></th>' for i in order)
    rows = "".join("<tr>" + "".join(f"<td>{html.escape(row[i])}</td>" for i in order) + "</tr>" for row in table.rows)
    details = "".join(
        f'<details id="run-{index}"><summary>{html.escape(run.name)}</summary><pre>'
        f"{html.escape(json.dumps(dict(run.settings), indent=1, ensure_ascii=False, default=str))}</pre></details>"
        for index, run in enumerate(runs)
    )
    return _document(
        f"<p>{len(runs)} finished, {len(skipped)} unfinished or failed</p>{_lost(skipped)}"
        f"{figure(runs)}<h2>Runs</h2>"
        '<label>Filter <input id="filter"></label>'
        '<div class="scroll" tabindex="0" role="region" aria-label="table of runs">'
        f'<table id="runs"><thead><tr>{head}</tr>'
        f"</thead><tbody>{rows}</tbody></table></div>"
        + (f"<h2>Relative proxy loss by layer, {low:.2g} to {high:.2g}</h2>{maps}" if maps else "")
        + f"<h2>Time and memory</h2>{bars(runs)}<h2>Settings</h2>{details}",
        f"<script>{_SCRIPT}</script>",
    )


def _lost(skipped: Sequence[Skipped]) -> str:
    """List of the unfinished and failed runs with reasons; nothing when there are none."""
    lost = "".join(f"<li>{html.escape(f'{item.path}: {item.reason}')}</li>" for item in skipped)
    return f"<h2>Unfinished or failed</h2><ul>{lost}</ul>" if lost else ""


def _document(body: str, script: str) -> str:
    return (
        '<!DOCTYPE html><html lang="en"><head><meta charset="utf-8"><title>Comparison of runs</title>'
        '<meta name="viewport" content="width=device-width"><meta http-equiv="Content-Security-Policy" '
        "content=\"default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'\">"
        f"<style>{_STYLE}</style></head><body><main><h1>Comparison of runs</h1>{body}</main>{script}</body></html>\n"
    )
