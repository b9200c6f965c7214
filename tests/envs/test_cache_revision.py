"""What is converted with Push-T's functions stays in the cache while their code stays as it is."""

import ast
import hashlib
from pathlib import Path

import pytest

import envs.pusht
import envs.pusht_geometry
import envs.pusht_relabelling

# By module: its CACHE_REVISION, and the SHA-256 of its code without comments, docstrings and imports. Where the code
# changes what it computes, change both; where it does not, change the second alone.
REVISIONS = {
    envs.pusht: (
        "3f303a64342c6647d7b6d63745988e2f18e57f02a2bb88d68b811a793c2b54db",
        "7801c65762b037177b1a8d03faf68c3b2cff487d977fb5369a689d5c844ba766",
    ),
    envs.pusht_geometry: (
        "a80451f38198d76709708dd939409064c49cfa1a6bb7ba3746b5dcd78fe9be72",
        "1421e1fb0b267e1a17b6755e70ad2e1435582f9b77eb79e9d84099db9f0103ac",
    ),
    envs.pusht_relabelling: (
        "1",
        "17c6f0c61ce713089061b8dd5392df3dc260dc34fe49def97875c75c19f0d5cc",
    ),
}


def code_of(module) -> str:
    tree = ast.parse(Path(module.__file__).read_text())
    for node in ast.walk(tree):
        body = getattr(node, "body", None)
        if isinstance(body, list):
            node.body = [
                part
                for part in body
                if not isinstance(part, ast.Import | ast.ImportFrom)
                and not (isinstance(part, ast.Expr) and isinstance(part.value, ast.Constant))
            ] or [ast.Pass()]
    return hashlib.sha256(ast.unparse(tree).encode()).hexdigest()


@pytest.mark.parametrize("module", REVISIONS, ids=lambda module: module.__name__)
def test_a_change_of_code_asks_for_another_revision(module):
    assert (module.CACHE_REVISION, code_of(module)) == REVISIONS[module]
