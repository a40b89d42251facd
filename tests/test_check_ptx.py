# SPDX-License-Identifier: Apache-2.0
"""The kernels' PTX orders memory as a table says; and what is no longer so is noticed."""

import pathlib

import pytest

from ep_testing import program_files

ROOT = pathlib.Path(__file__).resolve().parents[1]

KERNEL = (
    "_ZN6jax_ep10run_kernelINS_3dev10PlanKernelINS1_10PlanConfigILi{}ELi1088EEEEES4_NS_10P1EEvT1_"
)
PTX = f"""
.version 9.0
.func _ZN6jax_ep3dev10give_up_asERKNS_8RankViewENS_7WaitTagE(
	.param .b64 p
)
{{
	trap;
}}
.visible .entry {KERNEL.format(16)}(
	.param .align 8 .b8 p[8]
)
{{
	ld.global.b32 	%r1, [%rd1];
	@%p1 bra 	$L__BB0_1;
	@%p1 ld.acquire.sys.b64 %rd2, [%rd1];
	// begin inline asm
	st.release.sys.b32 [%rd1],%r1;
	st.release.sys.b32 [%rd3],%r1;
	bar.sync 	0;
	fence.proxy.async;
}}
.visible .entry {KERNEL.format(12)}(
)
{{
	ld.acquire.sys.b64 %rd2, [%rd1];
	st.release.sys.b32 [%rd1],%r1;
	st.release.sys.b32 [%rd3],%r1;
	bar.sync 	0;
	fence.proxy.async;
}}
"""
TABLE = """\
plan.cu: PlanKernel, each of 2 kernels
     1 bar.sync
     1 fence.proxy.async
     1 ld.acquire.sys.b64
     2 st.release.sys.b32

plan.cu: give_up_as
     1 trap
"""


tool = program_files.load(ROOT / "tools" / "check_ptx.py")


def _render(ptx: str, release: str = "13.0") -> str:
    return tool.render({"plan": ptx}, release)


def test_a_table_counts_what_orders_memory_in_each_function():
    assert _render(PTX) == tool.HEAD.format(release="13.0") + TABLE


@pytest.mark.parametrize(
    ("before", "after", "shown"),
    [
        # Where only one of the two kernels changes, they are told apart.
        ("st.release.sys.b32 [%rd1]", "st.relaxed.sys.b32 [%rd1]", "+     1 st.relaxed.sys.b32"),
        ("ld.acquire.sys", "ld.acquire.gpu", "+     1 ld.acquire.gpu.b64"),
        ("fence.proxy.async;", "", "-     1 fence.proxy.async"),
        ("ld.global.b32", "ld.global.nc.b32", "+     1 ld.global.nc.b32"),
        ("trap;", "ret;", "-     1 trap"),
    ],
)
def test_another_instruction_is_shown(before, after, shown):
    assert tool.difference(_render(PTX), _render(PTX)) == ""
    found = tool.difference(_render(PTX), _render(PTX.replace(before, after)))
    assert shown in found.splitlines()


def test_another_release_of_nvcc_may_repeat_instructions_but_have_no_others():
    fence = "fence.proxy.async;"
    table = _render(PTX)
    assert tool.difference(table, _render(PTX.replace(fence, fence + "\n" + fence), "13.1")) == ""
    found = tool.difference(table, _render(PTX.replace(fence, ""), "13.1"))
    assert "- fence.proxy.async" in found.splitlines()


def test_a_difference_is_an_error_that_says_what_to_do(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(tool, "ROOT", tmp_path)
    monkeypatch.setattr(tool, "TABLE", tmp_path / "table.txt")
    monkeypatch.setattr(tool, "find_nvcc", lambda: "nvcc")
    monkeypatch.setattr(tool, "release", lambda nvcc: "13.0")
    monkeypatch.setattr(tool, "compile_ptx", lambda nvcc, jobs: {"plan": PTX})
    monkeypatch.setattr("sys.argv", ["check_ptx.py"])
    tool.TABLE.write_text(_render(PTX.replace("trap;", "ret;")))
    assert tool.main() == 1
    assert "+     1 trap" in capsys.readouterr().err
    monkeypatch.setattr("sys.argv", ["check_ptx.py", "--update"])
    assert tool.main() == 0
    monkeypatch.setattr("sys.argv", ["check_ptx.py"])
    assert tool.main() == 0
    monkeypatch.setattr(tool, "find_nvcc", lambda: None)
    with pytest.raises(SystemExit, match="there is no nvcc"):
        tool.main()
