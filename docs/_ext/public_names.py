"""Links the types of signatures to their public names.

A signature names a class by the module that defines it (`zotune.directions.direction.Direction`); its page is that of
the name that users import (`zotune.Direction`).
"""

from __future__ import annotations

from typing import Any

from docutils import nodes
from sphinx.addnodes import pending_xref
from sphinx.application import Sphinx
from sphinx.environment import BuildEnvironment

PACKAGES = ("zotune", "zotune.llm", "zotune.ledger", "zotune.plan")


def _resolve(app: Sphinx, env: BuildEnvironment, node: pending_xref, content: nodes.TextElement) -> Any:
    """The page of the public name, for a reference that found none."""
    target = str(node.get("reftarget", ""))
    if node.get("refdomain") != "py":
        return None
    domain = env.domains.python_domain
    name = target.rpartition(".")[2]
    public = next((f"{package}.{name}" for package in PACKAGES if f"{package}.{name}" in domain.objects), None)
    if public is None:
        return None
    found = domain.objects[public]
    link = nodes.reference("", "", content, internal=True)
    link["refuri"] = app.builder.get_relative_uri(str(node.get("refdoc", env.docname)), found.docname)
    link["refuri"] += f"#{found.node_id}"
    return link


def setup(app: Sphinx) -> dict[str, Any]:
    """Resolve what Sphinx could not."""
    app.connect("missing-reference", _resolve)
    return {"version": "1", "parallel_read_safe": True}
