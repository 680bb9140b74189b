"""Files of pipelines: what is refused, each by an error that names the file and the place."""

import pytest

from mim_torchrec.pipeline.loading import load
from mim_torchrec.pipeline.spec import Pipeline, PipelineError, Stage
from mim_torchrec.pipeline.submission import build, shown

SHOP = '[stages.shop]\ncommand = "shop"\n'
BAD = {
    "not TOML": ("[stages.shop\n", r"not TOML: .*line 2"),
    "no stage": ("", "stages: missing"),
    "unknown key": (SHOP + "flagz = 1\n", "stages.shop.flagz: unknown key; did you mean 'flags'"),
    "unknown key of a job": (SHOP + "job.cpus = 1\n", "shop.job.cpus: unknown key; did you mean 'cpu'"),
    "unknown key of the file": ("[stage.a]\ncommand = 'shop'\n", "stage: unknown key; did you mean 'stages'"),
    "wrong type": (SHOP + "job.cpu = '4'\n", "stages.shop.job.cpu: .*integer.* but it is '4'"),
    "two programs": (SHOP + "component = 'mim.ctr'\n", "stages.shop: a stage has either a component"),
    "no program": ("[stages.shop]\nout = 'x'\n", "stages.shop: a stage has either a component"),
    "ranks of a command": (SHOP + "job.j = '1x2'\n", "stages.shop: a command runs in one process"),
    "a bad name": ("[stages.'a b']\ncommand = 'shop'\n", "a name has letters, digits"),
    "a reserved name": ("[stages.run]\ncommand = 'shop'\n", r"stages.run: \$\{run\} has a meaning"),
    "unknown reference": (
        SHOP + "flags.a = '${shp}/x'\n",
        r"stages.shop.flags.a: \$\{shp\} is neither a parameter nor a stage; did you mean 'shop'",
    ),
    "malformed reference": (SHOP + "flags.a = '${shop/x}'\n", r"\$\{shop/x\} is not of the form"),
    "a value of a path": (SHOP + "flags.a = '${run/x.json#y}'\n", r"\$\{run\} is a path and has no values"),
    "unknown stage": (SHOP + "after = ['shp']\n", "stages.shop.after: no stage 'shp'; did you mean 'shop'"),
    "itself": (SHOP + "flags.a = '${shop}'\n", "stages wait for each other: shop -> shop"),
    "cycle": (
        "[stages.a]\ncommand = 'shop'\nafter = ['b']\n[stages.b]\ncommand = 'shop'\nflags.x = '${a}'\n",
        "stages wait for each other: (a -> b -> a|b -> a -> b)",
    ),
    "one out of two": (SHOP + "out = 'x'\n[stages.b]\ncommand = 'shop'\nout = 'x'\n",
                       "stages.b.out: 'x' is the output of shop too"),
    "one out in another": (SHOP + "[stages.b]\ncommand = 'shop'\nout = 'shop/x'\n",
                           "stages.b.out: 'shop/x' and 'shop' of shop overlap"),
    "an out outside": (SHOP + "out = '../x'\n", "stages.shop.out: '../x' is not a path in the run directory"),
    "an out of the runner": (SHOP + "out = 'stages/x'\n", "stages.shop.out: 'stages' holds the records"),
    "no out": (SHOP + "out = false\n[stages.b]\ncommand = 'shop'\nflags.a = '${shop}'\n",
               r"stages.b.flags.a: stage shop has no output"),
    "no template": (SHOP + "like = 'x'\n", "stages.shop.like: no template 'x'; there are none"),
    "two meanings": ("[parameters]\nshop = 1\n" + SHOP, r"parameters.shop: a stage has this name too"),
    "a table parameter": ("[parameters]\na = { b = 1 }\n" + SHOP, "parameters.a: a string, number or"),
    "each of one": (SHOP + "each.seed = 1\n", "stages.shop.each.seed: a list of values is needed, not 1"),
    "each under one name": (SHOP + "each.seed = [1, 2]\n", "stages.shop: two of its 2 stages have one name"),
    "each on another": ("[stages.'a-{n}']\ncommand = 'shop'\neach.n = [1]\n[stages.a-1]\ncommand = 'shop'\n",
                        "stages.a-1: there is a stage 'a-1' already"),
}  # fmt: skip


def read(tmp_path, text: str, **parameters: str) -> Pipeline:
    file = tmp_path / "run.toml"
    file.write_text(f'name = "test"\n{text}')
    return load(file, parameters)


@pytest.mark.parametrize("fault", BAD)
def test_a_fault_is_named_with_its_place(tmp_path, fault):
    text, said = BAD[fault]
    with pytest.raises(PipelineError, match=f"run.toml: .*{said}") as caught:
        read(tmp_path, text)
    assert "\n" not in str(caught.value)


def test_an_unknown_parameter_and_one_of_another_type_are_refused(tmp_path):
    text = "[parameters]\nn = 1\n" + SHOP
    with pytest.raises(PipelineError, match="no parameter 'm'; there are n"):
        read(tmp_path, text, m="1")
    with pytest.raises(PipelineError, match="parameter n is 'many'; it must be int"):
        read(tmp_path, text, n="many")


def test_a_template_is_below_the_stage(tmp_path):
    text = """
    [parameters]
    n = 3
    [templates.t]
    component = "mim.ctr"
    job = { j = "1x2", env = { A = "1" } }
    flags = { data = "d", epochs = "${n}", lr = 1e-3 }
    [stages.a]
    like = "t"
    job.env.B = "2"
    flags = { lr = 1.0, out = "${out}/x" }
    """
    stage = read(tmp_path, text).stages["a"]
    assert stage.flags == {"data": "d", "epochs": 3, "lr": 1.0, "out": "${out}/x"}
    assert (stage.job.j, stage.job.env) == ("1x2", {"A": "1", "B": "2"})


def test_each_makes_a_stage_of_every_combination(tmp_path):
    text = (
        SHOP
        + """
    [stages."table-{seed}"]
    each.seed = "${seeds}"
    command = "table permute"
    flags.seed = "{seed}"
    [stages."ctr-{seed}-{grid.name}"]
    each = { seed = "${seeds}", grid = [{ name = "a", lr = 0.5 }, { name = "b", lr = 1.0 }] }
    component = "mim.ctr"
    out = "ctr/{seed}/{grid.name}"
    flags = { table = "${table-{seed}}", lr = "{grid.lr}", other = "{unknown}" }
    """
    )
    found = read(tmp_path, "[parameters]\nseeds = [0, 1]\n" + text, seeds="3,7")
    assert list(found.stages) == ["shop", "table-3", "table-7", "ctr-3-a", "ctr-3-b", "ctr-7-a", "ctr-7-b"]
    assert found.stages["table-7"].flags == {"seed": 7}
    assert found.stages["ctr-7-a"].flags == {"table": "${table-7}", "lr": 0.5, "other": "{unknown}"}
    assert found.dependencies["ctr-3-b"] == ["table-3"]
    assert str(found.output("ctr-3-b")) == "ctr/3/b"


def test_references_are_dependencies(tmp_path):
    text = SHOP + "[stages.b]\ncommand = 'shop'\nflags = { x = '${shop}/y', z = '${run}' }\n"
    assert read(tmp_path, text).dependencies == {"shop": [], "b": ["shop"]}


def test_stages_are_jobs_of_our_components():
    stage = Stage(component="mim.ctr", flags={"data": "d", "out": "o", "mim": "off", "seed": 3},
                  job={"j": "1x2", "cpu": 3, "env": {"A": "1"}})  # fmt: skip
    (role,) = build("a", stage).roles
    assert role.args[1].endswith("-m mim_torchrec.ctr.main --data d --out o --mim off --seed 3")
    assert "--nproc_per_node 2" in role.args[1]
    assert (role.resource.cpu, role.env["A"]) == (3, "1")
    assert shown(stage) == "mim.ctr -j 1x2 --data d --out o --mim off --seed 3"


def test_commands_are_jobs_of_one_process():
    stage = Stage(command="table permute", arguments=["t"], flags={"seed": 1, "out": "o"})
    (role,) = build("a", stage).roles
    assert role.args[1].endswith("-m mim_torchrec.cli table permute t --seed 1 --out o")


@pytest.mark.parametrize(
    "stage, said",
    [
        ({"component": "mim.ctx"}, "stages.a.component: 'ctx' is no stage of a run"),
        ({"command": "serve"}, "stages.a.command: 'serve' is no stage of a run"),
        ({"component": "dist.no"}, "stages.a.component: Component `dist.no` not found"),
        ({"component": "no/such.py:f"}, "stages.a.component: .*such.py"),
        ({"component": "mim.ctr", "flags": {"data": "d"}}, "stages.a.flags.out: component mim.ctr needs it"),
        ({"command": "shop", "job": {"cpu": -1}}, "stages.a.job: --cpu, --gpu and --memMB are at least 0"),
        (
            {"component": "mim.csft", "flags": {"data": "d", "out": "o"}, "job": {"j": "0x2"}},
            "stages.a: component mim.csft: -j 0x2: write",
        ),
        (
            {"component": "utils.echo", "job": {"gpu": 1}},
            "stages.a.job.gpu: component utils.echo has no such",
        ),
        ({"component": "utils.echo", "flags": {"lr": 1}}, "component utils.echo does not take --lr 1"),
    ],
)
def test_a_job_that_cannot_be_is_refused(stage, said):
    with pytest.raises(ValueError, match=said):
        build("a", Stage(**stage))
