"""`slurm/pipeline.sh`: what it submits, and what it does not; sbatch is a stand-in."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from lbr_dist.launch.slurm import main
from lbr_dist.recipes import load_recipe

PROJECT = Path(__file__).parents[2]
SITE = PROJECT / "slurm" / "site.env"


@pytest.fixture
def pipeline(tmp_path: Path) -> Callable[..., subprocess.CompletedProcess[str]]:
    """Runs the script with recipes of both stages; what sbatch and scancel were asked is in `asked`."""
    for command in ("sbatch", "scancel"):
        file = tmp_path / "bin" / command
        file.parent.mkdir(exist_ok=True)
        file.write_text(
            f'#!/bin/sh\nenv >>{tmp_path}/seen\necho "{command} $*" >>{tmp_path}/asked\n'
            'case "$*" in *eval.sh*) [ -z "$REFUSE" ] || exit 1 ;; esac\n[ "${0##*/}" = scancel ] || echo "7$CLUSTER"\n'
        )
        file.chmod(0o755)
    for stage, name in (("generative", "one"), ("contrastive", "two")):
        (tmp_path / f"{name}.yaml").write_text(
            f"stage: {stage}\noutput: {tmp_path}/{name}\nmodel: {{path: m}}\ndata: {{sets: [{{path: d}}]}}\n"
            "batch: {global_batch: 1}\nduration: {steps: 1}\nbottleneck: {tokens: 1}\n"
        )

    def run(
        site_file: Path = SITE, option: str = "--nodes=2", after: Sequence[str] = (), **environ: str
    ) -> subprocess.CompletedProcess[str]:
        module = f'module() {{ echo "$*" >>{tmp_path}/modules; }}; export -f module'
        return subprocess.run(
            ["bash", "-c", f'{module}; exec {PROJECT}/slurm/pipeline.sh "$@"', "-", option,
             str(tmp_path / "one.yaml"), str(tmp_path / "two.yaml"), *after],
            env={"PATH": f"{tmp_path / 'bin'}:/usr/bin:/bin", "TMPDIR": "/run/user/7", "LBR_SITE": str(site_file),
                 **environ},
            capture_output=True, text=True, check=False,
        )  # fmt: skip

    return run


def test_a_chain_that_cannot_end_well_is_not_begun(
    pipeline: Callable[..., subprocess.CompletedProcess[str]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    one, two, same = (tmp_path / f"{name}.yaml" for name in ("one", "two", "same"))
    same.write_text(two.read_text().replace(f"{tmp_path}/two", f"{tmp_path}/runs/../one"))
    assert main(["chain", "--then", str(one), str(two)]) == 2
    assert "two.yaml: stage is contrastive: the first of the two has to be generative" in capsys.readouterr().err
    assert main(["chain", "--then", str(same), str(one)]) == 2
    assert f"its output is also that of {one}" in capsys.readouterr().err
    same.write_text(two.read_text().replace("{tokens: 1}", "{tokens: 3}"))
    assert main(["chain", "--then", str(same), str(one)]) == 2
    assert "other bottleneck settings (bottleneck.tokens is 3 here and 1 there" in capsys.readouterr().err
    same.write_text(two.read_text().replace(f"{tmp_path}/two", f"{tmp_path}/one"))
    same.replace(two)
    assert pipeline(LBR_PYTHON=sys.executable).returncode == 2
    assert not (tmp_path / "asked").exists()


def test_an_export_that_could_not_be_made_is_told_first(
    pipeline: Callable[..., subprocess.CompletedProcess[str]], tmp_path: Path
) -> None:
    """Of recipes as they ship, whose texts get one or more bottleneck tokens, the export failed behind all the rest."""
    for file in (tmp_path / "one.yaml", tmp_path / "two.yaml"):
        file.write_text(file.read_text().replace("{tokens: 1}", "{ratio: 500}"))
    python = {"LBR_PYTHON": sys.executable}
    refused = pipeline(**python)
    assert refused.returncode == 2
    assert "texts get 1 to 3 bottleneck tokens" in refused.stderr
    assert "pass --tokens N (1 to 3)" in refused.stderr
    assert pipeline(after=("--tokens=4",), **python).returncode == 2
    assert pipeline(after=("out", "--token", "1"), **python).stderr.startswith("error: usage: ")
    assert not (tmp_path / "asked").exists()
    for after in (["out", "--tokens", "1"], ["--tokens=1"]):
        assert pipeline(after=after, **python).returncode == 0
        out = "out --tokens 1" if after[0] == "out" else f"{tmp_path}/two/model --tokens=1"
        assert (tmp_path / "asked").read_text().splitlines()[-1].endswith(f"--data d -- {out}")


def test_what_cannot_be_evaluated_or_exported_is_not_trained(
    pipeline: Callable[..., subprocess.CompletedProcess[str]], tmp_path: Path
) -> None:
    python = {"LBR_PYTHON": sys.executable}
    (tmp_path / "file").touch()
    refused = pipeline(after=(str(tmp_path / "file"),), **python)
    assert refused.stderr == f"error: OUT {tmp_path}/file: is a file: name a folder for the exported model\n"
    refused = pipeline(after=("duration.steps=4",), **python)
    assert refused.returncode == 2
    assert refused.stderr.startswith("error: OUT duration.steps=4: looks like an override, and a pipeline takes none")
    assert not (tmp_path / "asked").exists()
    assert pipeline(after=("./duration.steps=4",), **python).returncode == 0
    (tmp_path / "asked").unlink()
    two, (held_out, texts) = tmp_path / "two.yaml", ({"records": 2, "texts": 1}, {"records": 2, "texts": 2})
    two.write_text(two.read_text().replace("path: d", f"path: {tmp_path}/set"))
    (tmp_path / "set").mkdir()
    for side, code in ((texts, 2), (held_out, 0)):
        (tmp_path / "set" / "manifest.json").write_text(
            json.dumps({"format": 0, "fingerprint": "", "splits": {"eval": side}})
        )
        done = pipeline(**python)
        assert done.returncode == code
        assert (tmp_path / "asked").exists() is not ("no question on its eval side: prepare it" in done.stderr)


def test_what_a_site_file_and_its_modules_say_is_no_answer(
    pipeline: Callable[..., subprocess.CompletedProcess[str]], tmp_path: Path
) -> None:
    """Stage 2 was submitted with a word of theirs for its folder."""
    site_file = tmp_path / "site.env"
    own = "echo welcome\nmodule() { echo loading; }\nexport LBR_MODULES=gcc\n"
    site_file.write_text(f"{own}{SITE.read_text()}[ -f none ] && . none\n")
    done = pipeline(site_file, LBR_PYTHON=sys.executable)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[:2] == [f"stage 1: job 7 -> {tmp_path}/one", f"stage 2: job 7 -> {tmp_path}/two"]
    (tmp_path / "asked").unlink()
    talking = tmp_path / "talking"
    talking.write_text(f'#!/bin/sh\necho Activating\nexec {sys.executable} "$@"\n')
    talking.chmod(0o755)
    done = pipeline(LBR_PYTHON=str(talking))
    assert done.returncode == 2
    assert "prints more than it is asked for ('Activating'): see that LBR_PYTHON" in done.stderr
    assert not (tmp_path / "asked").exists()


def test_the_project_is_found_whatever_cd_says() -> None:
    env = {"PATH": "/usr/bin:/bin", "CDPATH": "."}
    done = subprocess.run(["slurm/pipeline.sh"], cwd=PROJECT, env=env, capture_output=True, text=True, check=False)
    assert done.stderr.startswith("error: usage: ")


def test_a_pipeline_that_is_submitted_says_that_it_is_to_be_run(tmp_path: Path) -> None:
    """Slurm runs a copy in a folder of its own."""
    copy = tmp_path / "slurmd" / "job00007" / "slurm_script"
    copy.parent.mkdir(parents=True)
    copy.write_bytes((PROJECT / "slurm" / "pipeline.sh").read_bytes())
    env = {"PATH": "/usr/bin:/bin"}
    done = subprocess.run(["bash", copy, "one.yaml", "two.yaml"], env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr.startswith(f"error: no slurm/read_site.sh in {tmp_path}/slurmd: run slurm/pipeline.sh,")


def test_a_chain_of_jobs_that_are_not_submitted_is_refused(
    pipeline: Callable[..., subprocess.CompletedProcess[str]], tmp_path: Path
) -> None:
    done = pipeline(LBR_PYTHON=sys.executable, option="--test-only")
    assert done.returncode == 2
    assert done.stderr.startswith("error: --test-only submits no job to wait for")
    assert not (tmp_path / "asked").exists()


def test_a_pipeline_that_is_refused_in_part_is_taken_back(
    tmp_path: Path, pipeline: Callable[..., subprocess.CompletedProcess[str]]
) -> None:
    done = pipeline(LBR_PYTHON=sys.executable, REFUSE="1")
    assert done.returncode == 1
    assert done.stdout == ""
    assert done.stderr == "error: not submitted whole; cancelled: 7 7\n"
    assert (tmp_path / "asked").read_text().splitlines()[-1] == "scancel 7 7"


def test_a_chain_stays_on_the_cluster_that_took_its_first_job(
    tmp_path: Path, pipeline: Callable[..., subprocess.CompletedProcess[str]]
) -> None:
    """There `sbatch --parsable` says JOB;CLUSTER, which is no job for a dependency, or for scancel."""
    done = pipeline(LBR_PYTHON=sys.executable, option="--clusters=a,b", CLUSTER=";b")
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[2] == f"eval:    job 7 -> {tmp_path}/two/eval, {tmp_path}/two/model"
    one, two, three = (tmp_path / "asked").read_text().splitlines()
    assert one.endswith(f"--clusters=a,b {PROJECT}/slurm/stage1.sh {tmp_path}/one.yaml --then {tmp_path}/two.yaml")
    after = "--dependency=afterok:7 --kill-on-invalid-dep=yes"
    assert two.startswith(f"sbatch --parsable --clusters=a,b --clusters=b {after} {PROJECT}/slurm/stage2.sh")
    assert three.startswith(f"sbatch --parsable {after} --clusters=b {PROJECT}/slurm/eval.sh")
    (tmp_path / "asked").unlink()
    assert pipeline(LBR_PYTHON=sys.executable, CLUSTER=";b", REFUSE="1").stderr.endswith("cancelled: 7 7\n")
    assert (tmp_path / "asked").read_text().splitlines()[-1] == "scancel --clusters=b 7 7"


def test_a_dependency_that_is_given_is_the_first_jobs_alone(
    tmp_path: Path, pipeline: Callable[..., subprocess.CompletedProcess[str]]
) -> None:
    """sbatch takes the last one: stage 2 would not wait for stage 1, and begin from what an earlier start left."""
    assert pipeline(LBR_PYTHON=sys.executable, option="--dependency=afterok:3").returncode == 0
    given = [re.findall(r"--dependency=(\S+)", line)[-1] for line in (tmp_path / "asked").read_text().splitlines()]
    assert given == ["afterok:3", "afterok:7", "afterok:7"]


def test_a_folder_whose_name_yaml_would_read_otherwise(
    tmp_path: Path, pipeline: Callable[..., subprocess.CompletedProcess[str]]
) -> None:
    """Stage 2 would start from `one`, which may be another run, or find out when stage 1 has run."""
    recipe, folder = tmp_path / "one.yaml", f"{tmp_path}/one #2: yes"
    recipe.write_text(recipe.read_text().replace(f"output: {tmp_path}/one", f"output: '{folder}'"))
    assert pipeline(LBR_PYTHON=sys.executable).returncode == 0
    _, two, _ = (tmp_path / "asked").read_text().splitlines()
    given = two[two.index("model.start_from=") :]
    assert load_recipe(tmp_path / "two.yaml", [given]).model.start_from == folder


def test_a_pipeline_leaves_the_jobs_to_their_own_settings(
    tmp_path: Path, pipeline: Callable[..., subprocess.CompletedProcess[str]]
) -> None:
    """Modules are loaded and a Pyxis container's Python is not run where jobs are only submitted."""
    site_file = tmp_path / "site.env"
    site_file.write_text(
        f'export SBATCH_ACCOUNT=mine LBR_MODULES="gcc cuda" LBR_PYTHON=/opt/in-the-container/python\n'
        f"export LBR_CONTAINER=--container-image=x LBR_LOGIN_PYTHON={sys.executable}\n{SITE.read_text()}"
    )
    done = pipeline(site_file)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[1] == f"stage 2: job 7 -> {tmp_path}/two"
    assert (tmp_path / "modules").read_text().splitlines()[0] == "load gcc cuda"
    seen = (tmp_path / "seen").read_text()
    assert "SBATCH_ACCOUNT=mine" in seen
    assert "LBR_SCRATCH" not in seen
    assert "HF_HUB_OFFLINE" not in seen
