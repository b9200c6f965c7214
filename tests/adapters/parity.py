"""The comparison with reference outputs that the tests of all adapters make."""

from policy.adapters.imported import build_policy
from policy.adapters.parity import compare, read_reference


def check_parity(read, folder, backend):
    """Compare an imported policy with everything that its folder's reference holds."""
    found = compare(
        build_policy(read, str(folder)),
        read_reference(folder / "reference.npz"),
        keys={},
        execution_horizon=read.execution_horizon,
        backends=[backend],
    )
    names = [comparison.name for comparison in found]
    assert len(names) == 30
    assert {"condition", "DDIM 8, leading", "DDPM 100, executed", "20 control steps"} < set(names)
    assert [comparison for comparison in found if not comparison.holds] == []
