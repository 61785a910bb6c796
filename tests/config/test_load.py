"""Loading by name and path, what goes wrong with it, and overrides that reach."""

import sys

import pytest

from xtuner.config import load_config
from xtuner.config.dump import spelled_out
from xtuner.config.load import load
from xtuner.config.values import own_values
from xtuner.utils.errors import UserError

CONFIG = """\
import torch
from torch.optim import AdamW, SGD
from mmengine.dataset import DefaultSampler
from xtuner.utils import PROMPT_TEMPLATE

pretrained_model_name_or_path = 'some/模型'; use_varlen_attn = False
prompt_template = PROMPT_TEMPLATE.default
lr = 2e-4
batch_size, max_length = 1, 2048
accumulative_counts = 16
accumulative_counts *= 2
max_epochs = 3
warmup_ratio = 0.03
betas = (0.9,
         0.999)
optim_type = AdamW
evaluation_inputs = ['你好', 'Hello']
tokenizer = dict(type=AdamW, padding_side='right')
model = dict(llm=dict(pretrained_model_name_or_path=pretrained_model_name_or_path,
                      torch_dtype=torch.float16), lora=None)
train_dataset = dict(type='x', max_length=max_length, tokenizer=tokenizer, nested=dict(a=1))
train_dataloader = dict(batch_size=batch_size, dataset=train_dataset, sampler=dict(shuffle=True))
optim_wrapper = dict(
    optimizer=dict(type=optim_type, lr=lr, betas=betas, weight_decay=(0)),
    accumulative_counts=accumulative_counts)
param_scheduler = [dict(end=warmup_ratio * max_epochs), dict(end=max_epochs)]
custom_hooks = [dict(tokenizer=tokenizer, every=1)]
if not use_varlen_attn:
    custom_hooks += [dict(late=True)]
randomness = dict(seed=None)
train_cfg = dict(max_epochs=max_epochs)
"""


@pytest.fixture
def config(tmp_path):
    path = tmp_path / "my_config.py"
    path.write_text(CONFIG, "utf-8")
    return str(path)


def test_lazy_and_named(config):
    cfg = load_config(config)
    assert cfg.filename == config
    assert str(dict.__getitem__(cfg.optim_wrapper.optimizer, "type")) == "AdamW"
    assert load_config("quickstart").filename == "quickstart.py"


def test_imported_names_know_their_file(config):
    """Their message says which line of the config they come from, not of a temporary copy."""
    cfg = load_config(config, ["lr=1"])
    optimizer = own_values(cfg)["optim_wrapper"]["optimizer"]
    assert dict.__getitem__(optimizer, "type").location == f"{config}, line 2"


def test_loading_needs_no_torch():
    import subprocess

    code = (
        "import sys; from xtuner.config import load_config, dump_config;"
        "dump_config(load_config('quickstart', ['lr=1e-5']));"
        "print([m for m in ('torch', 'transformers', 'datasets', 'peft') if m in sys.modules])"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"


@pytest.mark.parametrize(
    ("option", "key", "value"),
    [
        ("lr=3e-5", "optim_wrapper.optimizer.lr", 3e-5),
        ("batch_size=4", "train_dataloader.batch_size", 4),
        ("max_length=1024", "train_dataloader.dataset.max_length", 1024),
        ("accumulative_counts=4", "optim_wrapper.accumulative_counts", 8),
        ("max_epochs=1", "train_cfg.max_epochs", 1),
        ("max_epochs=1", "param_scheduler.0.end", 0.03),
        ("betas=(0.9, 0.95)", "optim_wrapper.optimizer.betas", (0.9, 0.95)),
        ("use_varlen_attn=true", "custom_hooks", None),
        ("evaluation_inputs=['a', 'b c', '丙']", "evaluation_inputs", ["a", "b c", "丙"]),
        (
            "pretrained_model_name_or_path=/a-b/c.d",
            "model.llm.pretrained_model_name_or_path",
            "/a-b/c.d",
        ),
        ("pretrained_model_name_or_path=42", "model.llm.pretrained_model_name_or_path", "42"),
        ("model.pretrained=/base", "model.llm.pretrained_model_name_or_path", "/base"),
        ("optimizer.lr=1e-6", "lr", 1e-6),
        ("optimizer.lr=1e-6", "optim_wrapper.optimizer.lr", 1e-6),
        ("optimizer.weight_decay=0.1", "optim_wrapper.optimizer.weight_decay", 0.1),
        ("optim_wrapper.optimizer.lr=1e-6", "lr", 2e-4),
        ("train_dataloader.batch_size=4", "train_dataloader.batch_size", 4),
        ("train_dataloader.batch_size=4", "batch_size", 1),
        ("train_dataset.max_length=512", "train_dataloader.dataset.max_length", 512),
        ("train_dataloader.dataset.max_length=512", "train_dataloader.dataset.max_length", 512),
        ("train_dataloader.dataset.nested.a=2", "train_dataloader.dataset.nested.a", 2),
        ("custom_hooks.0.every=7", "custom_hooks.0.every", 7),
        ("custom_hooks.1.late=False", "custom_hooks.1.late", False),
        ("custom_hooks.0.tokenizer.padding_side=left", "tokenizer.padding_side", "right"),
        (
            "custom_hooks.0.tokenizer.padding_side=left",
            "custom_hooks.0.tokenizer.padding_side",
            "left",
        ),
        ("tokenizer.padding_side=left", "custom_hooks.0.tokenizer.padding_side", "left"),
        ("randomness.seed=7", "randomness.seed", 7),
        ("randomness.deterministic=True", "randomness.deterministic", True),
        ("model.lora={'r': 8, 'alpha': [1, None]}", "model.lora", {"r": 8, "alpha": [1, None]}),
        ("model.lora=dict(r=8)", "model.lora.r", 8),
        ("work_dir=./out 1", "work_dir", "./out 1"),
        ("train_dataloader.pin_memory=yes", "train_dataloader.pin_memory", "yes"),
        ("train_dataloader.sampler.shuffle=false", "train_dataloader.sampler.shuffle", False),
    ],
)
def test_override_reaches(config, option, key, value):
    from xtuner.config.values import value_at

    cfg = load_config(config, [option])
    if value is not None:
        assert value_at(own_values(cfg), key.split(".")) == value
    else:
        assert len(cfg.custom_hooks) == 1
    assert len(cfg._text.splitlines()) - len(CONFIG.splitlines()) in (0, 1)


def test_several_names_of_one_value(tmp_path):
    path = tmp_path / "shared.py"
    path.write_text("from torch.optim import AdamW\na = b = 1\nc, d = (2, 3)\ne = [a, b, c, d]\n")
    assert load_config(path, ["a=7", "d=9"]).e == [7, 1, 2, 9]


def test_overrides_together(config):
    cfg = load_config(
        config, ["optim_wrapper.optimizer.lr=1e-6", "lr=3e-5", "max_length=64", "batch_size=2"]
    )
    assert cfg.lr == 3e-5
    assert cfg.optim_wrapper.optimizer.lr == 1e-6
    assert cfg.train_dataloader.dataset.max_length == 64
    assert cfg.train_dataloader.batch_size == 2


@pytest.mark.parametrize(
    ("option", "line"),
    [
        (
            "prompt_template=PROMPT_TEMPLATE.qwen_chat",
            "prompt_template = PROMPT_TEMPLATE.qwen_chat",
        ),
        ("optim_type=SGD", "optimizer=dict(type=SGD, "),
        ("model.llm.torch_dtype=torch.bfloat16", "torch_dtype=torch.bfloat16"),
    ],
)
def test_imported_names_as_values(config, option, line):
    assert line in spelled_out(load_config(config, [option])).replace("\n        ", "")


def test_nothing_is_run(config, tmp_path):
    target = tmp_path / "made"
    word = f"bot = __import__('os').mkdir({str(target)!r})".partition("= ")[2]
    cfg = load_config(config, [f"work_dir={word}"])
    assert cfg.work_dir == word
    assert not target.exists()


@pytest.mark.parametrize(
    ("option", "hint"),
    [
        ("learning_rate=1e-5", "'lr'"),
        ("batchsize=4", "'batch_size'"),
        ("optim_wrapper.optimiser.lr=1", "'optim_wrapper.optimizer.lr'"),
        ("weight_decay=1", "'optim_wrapper.optimizer.weight_decay'"),
        ("optim_wrapper.optimizer.learning_rate=1", "'lr'"),
        ("custom_hooks.5.every=1", "'custom_hooks.0' ... 'custom_hooks.1'"),
        ("train_dataloader.batchsize=1", "'train_dataloader.batch_size'"),
        ("randomness.sed=1", "'randomness.seed'"),
        ("lr.x=1", "nothing inside it"),
        ("lr=le-5", "expected a number like 0.0002"),
        ("lr", "not KEY=VALUE"),
        ("=3", "not KEY=VALUE"),
        ("a..b=3", "not KEY=VALUE"),
    ],
)
def test_bad_override(config, option, hint):
    with pytest.raises(UserError) as error:
        load_config(config, [option])
    assert hint in str(error.value)


def test_all_bad_overrides_at_once(config):
    with pytest.raises(UserError) as error:
        load_config(config, ["batchsize=4", "lrr=1", "max_epochs=2"])
    assert "batchsize" in str(error.value) and "lrr" in str(error.value)


@pytest.mark.parametrize(
    ("option", "fits"),
    [
        ("optim_wrapper.optimizer.amsgrad=True", True),
        ("optim_wrapper.optimizer.amsgard=True", False),
        ("model.llm.attn_implementation=sdpa", True),
        ("model.lora.use_dora=True", True),
        ("model.lora.use_dorra=True", False),
        ("custom_hooks.1.max_new_tokens=5", True),
    ],
)
def test_new_key_must_fit_the_callee(option, fits):
    name = "internlm2_chat_7b_qlora_alpaca_e3"
    if fits:
        assert option.partition("=")[2] in load_config(name, [option])._text
        return
    with pytest.raises(UserError, match="there is no key"):
        load_config(name, [option])


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("no_such_config.py", ["there is no such config file"]),
        ("./my_confg.py", ["there is no such config file"]),
        ("internlm2_chat_7b_qlora_alpacca_e3", ["internlm2_chat_7b_qlora_alpaca_e3"]),
        ("quickstrat", ["quickstart"]),
        ("/", ["folder"]),
    ],
)
def test_no_such_config(name, words):
    with pytest.raises(UserError) as error:
        load_config(name)
    assert all(word in str(error.value) for word in words)


def test_folder_of_the_same_name(tmp_path, monkeypatch):
    (tmp_path / "quickstart").mkdir()
    monkeypatch.chdir(tmp_path)
    assert load_config("quickstart").filename == "quickstart.py"


def test_near_file_is_suggested(config, tmp_path):
    with pytest.raises(UserError, match=r"my_config\.py"):
        load_config(str(tmp_path / "my_confg.py"))


def test_syntax_error_says_where(tmp_path):
    path = tmp_path / "broken.py"
    path.write_text("a = 1\nb = dict(c=2\nd = 3\n")
    with pytest.raises(UserError) as error:
        load_config(path)
    assert error.value.where.line == 2
    assert "b = dict(c=2" in str(error.value)


@pytest.mark.parametrize("edited", [False, True])
def test_failure_says_where(tmp_path, edited):
    path = tmp_path / "failing.py"
    path.write_text("from torch.optim import AdamW\nlr = 1\nx = [1][3]\n")
    with pytest.raises(UserError) as error:
        load_config(path) if not edited else load_config(path, ["lr=2"])
    assert (error.value.where.file, error.value.where.line) == (str(path), 3)
    assert "IndexError" in str(error.value) and "x = [1][3]" in str(error.value)


def test_not_text(tmp_path):
    path = tmp_path / "binary.py"
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UserError, match="UTF-8"):
        load_config(path)


def test_base_configs_and_their_folder(tmp_path):
    (tmp_path / "base.py").write_text("from torch.optim import AdamW\nlr = 1\nopt = dict(lr=lr)\n")
    child = tmp_path / "child.py"
    child.write_text(
        "from mmengine.config import read_base\n"
        "with read_base():\n    from .base import *\nmax_length = 1\n"
    )
    assert load_config(child).opt.lr == 1
    cfg = load_config(child, ["opt.lr=5", "max_length=3"])
    assert (cfg.opt.lr, cfg.max_length) == (5, 3)
    with pytest.raises(UserError, match=r"'opt\.lr'"):
        load_config(child, ["lr=5"])
    assert sorted(path.name for path in tmp_path.iterdir() if path.is_file()) == [
        "base.py",
        "child.py",
    ]


def test_plain_formats(tmp_path):
    path = tmp_path / "plain.json"
    path.write_text('{"lr": 1, "optim_wrapper": {"optimizer": {"lr": 1}}}')
    assert load_config(path, ["optim_wrapper.optimizer.lr=2"]).optim_wrapper.optimizer.lr == 2
    path.write_text("{")
    with pytest.raises(UserError, match="cannot be read"):
        load_config(path)


@pytest.mark.parametrize("suffix", [".yaml", ".yml"])
@pytest.mark.parametrize(
    "value",
    [
        "!!python/object/apply:os.mkdir [{target!r}]",
        "!!python/object/new:os.mkdir [{target!r}]",
        "!!python/name:os.mkdir",
        "!!python/module:antigravity",
    ],
)
def test_yaml_is_data(tmp_path, suffix, value):
    """No tag builds an object: not in the file, not in a base of it."""
    target = tmp_path / "made"
    (tmp_path / f"bad{suffix}").write_text("lr: 1\nx: " + value.format(target=str(target)) + "\n")
    (tmp_path / f"child{suffix}").write_text(f"_base_: ./bad{suffix}\nlr: 2\n")
    for name in ("bad", "child"):
        with pytest.raises(UserError, match="plain data") as error:
            load_config(tmp_path / f"{name}{suffix}")
        assert error.value.where.line == 2
    assert not target.exists() and "antigravity" not in sys.modules


def test_yaml_loads_with_bases_and_overrides(tmp_path):
    (tmp_path / "base.yaml").write_text("lr: 1\nmodel: {a: [1, 2]}\n")
    child = tmp_path / "child.yaml"
    child.write_text("_base_: ./base.yaml\nlr: 2\n")
    cfg = load_config(child, ["model.a.1=7"])
    assert (cfg.lr, cfg.model.a) == (2, [1, 7])
    assert load_config(child).model.a == [1, 2]


def test_broken_data_names_its_line(tmp_path):
    for name, text in (("a.json", '{"lr": 1,\n "x": }'), ("a.yaml", "lr: 1\nx: [1\n")):
        (tmp_path / name).write_text(text)
        with pytest.raises(UserError, match="cannot be read") as error:
            load_config(tmp_path / name)
        assert error.value.where.line in (2, 3)


def test_check_cfg_reads_data_too(tmp_path):
    from xtuner.config.check import check

    (tmp_path / "a.yaml").write_text("train_cfg: {max_epochs: 0}\n")
    assert {"XT0310", "XT0203"} <= {problem.code for problem in check(tmp_path / "a.yaml")}


def test_a_byte_order_mark_is_no_part_of_a_config(tmp_path):
    config = tmp_path / "c.py"
    config.write_bytes(b"\xef\xbb\xbfa = 1\n")
    assert load(config).config.a == 1


@pytest.mark.parametrize(("name", "text"), [("c.json", "[]"), ("c.yaml", "- a\n"), ("c.yml", "")])
def test_data_that_are_no_settings_are_refused(name, text, tmp_path):
    (tmp_path / name).write_text(text)
    with pytest.raises(UserError, match="an object is expected"):
        load(tmp_path / name)
