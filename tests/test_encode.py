"""python -m sitfast.encode: its latents against the VAE itself, kills, ranks, and training from the result."""

import json
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL
from PIL import Image
from safetensors.torch import load_file

from sitfast import config, data, encode, parallel
from sitfast.errors import SitfastError
from sitfast.vae import build_vae
from tests.conftest import command, losses, train

KILLED = """
import os, signal, sys
from sitfast import encode, images
from sitfast.data import latents
write = latents.write_shard
def killing(folder, number, **rest):
    if number == {at}:
        (folder / f".{{latents.shard_name(number)}}.1.tmp").write_bytes(b"half")
        os.kill(os.getpid(), signal.SIGKILL)
    write(folder, number, **rest)
latents.write_shard = killing
encode.main(sys.argv[1:])
"""


@pytest.fixture(autouse=True)
def one_thread():
    """As torchrun gives its processes: the bits of a latent depend on how many threads share a sum."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def tiny_vae(path, **changes) -> str:
    torch.manual_seed(0)
    blocks = {"down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2}
    model = AutoencoderKL(block_out_channels=(8, 16), norm_num_groups=4, latent_channels=4, **blocks, **changes)
    model.save_pretrained(path)
    return str(path)


@pytest.fixture(scope="module")
def vae(tmp_path_factory) -> str:
    return tiny_vae(tmp_path_factory.mktemp("vae"), scaling_factor=0.25)


@pytest.fixture
def images(image_folder, vae) -> list[str]:
    """36 images in three classes; a batch of 4 makes shards of 10 end with a batch of 2."""
    return [
        "data.source=folder", f"data.path={image_folder}", "data.image_size=8", "data.num_workers=0", "train.device=cpu",
        f"vae.id={vae}", "vae.batch_size=4", "data.max_unreadable=0.1",
    ]  # fmt: skip


def run(out: Path, *overrides: str, **settings) -> dict:
    cfg = config.load(None, list(overrides))
    with parallel.start(cfg) as world:
        return encode.encode(cfg, world, out, **{"shard_rows": 10, **settings})


def shards(out: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(out.glob("shard-*"))}


def test_moments_of_every_image_and_its_mirror(images, vae, tmp_path):
    manifest = run(tmp_path / "out", *images)
    source = data.build_source(config.load(None, images).data)
    model = AutoencoderKL.from_pretrained(vae, low_cpu_mem_usage=False).eval()
    stored = [load_file(path) for path in sorted((tmp_path / "out").glob("shard-*"))]
    assert [len(part["row"]) for part in stored] == [10, 10, 10, 6]
    assert torch.cat([part["row"] for part in stored]).tolist() == list(range(36))
    x = torch.stack([source.load(row)[0] for row in range(36)]).float() / 127.5 - 1
    assert torch.cat([part["label"] for part in stored]).tolist() == [source.load(row)[1] for row in range(36)]
    moments = torch.cat([part["moments"] for part in stored])
    assert moments.shape == (36, 2, 2, 4, 4, 4) and moments.dtype == torch.float16
    for view, picture in enumerate((x, x.flip(-1))):
        with torch.no_grad():
            mean, logvar = model.quant_conv(model.encoder(picture)).chunk(2, dim=1)
        torch.testing.assert_close(moments[:, view, 0].float(), mean, rtol=1e-3, atol=1e-5)
        torch.testing.assert_close(moments[:, view, 1].float(), (logvar / 2).exp(), rtol=1e-3, atol=1e-5)
    values = moments.double().numpy()
    variance = (values[:, :, 0] ** 2 + values[:, :, 1] ** 2).mean((0, 1, 3, 4)) - values[:, :, 0].mean(
        (0, 1, 3, 4)
    ) ** 2
    np.testing.assert_allclose(manifest["channel_std"], np.sqrt(variance), rtol=1e-3)
    about = {k: manifest[k] for k in ("count", "unreadable", "image_size", "views", "scale", "class_names", "num_rows")}
    assert about == {
        "count": 36, "unreadable": 0, "image_size": 8, "views": 2, "scale": [0.25], "num_rows": 36,
        "class_names": ["class0", "class1", "class2"],
    }  # fmt: skip


def test_without_mirrors_in_bf16(images, tmp_path):
    run(tmp_path / "both", *images)
    run(tmp_path / "one", *images, "data.flip=false", dtype="bf16")
    both, one = (load_file(tmp_path / name / "shard-00003.safetensors")["moments"] for name in ("both", "one"))
    assert one.shape == (6, 1, 2, 4, 4, 4) and one.dtype == torch.bfloat16
    torch.testing.assert_close(one[:, 0].float(), both[:, 0].float(), rtol=2**-8, atol=1e-3)


def test_a_killed_run_is_finished_without_doing_a_shard_again(images, tmp_path):
    run(tmp_path / "straight", *images)
    arguments = [*images, "--out", str(tmp_path / "out"), "--shard-rows", "10"]
    killed = command("", *arguments, code=KILLED.format(at=2))
    assert killed.returncode == -signal.SIGKILL
    assert [*shards(tmp_path / "out")] == ["shard-00000.safetensors", "shard-00001.safetensors"]
    assert not (tmp_path / "out/manifest.json").exists()
    before = {path.name: path.stat() for path in (tmp_path / "out").glob("shard-*")}
    with pytest.raises(SitfastError, match="run the same sitfast.encode again to finish it"):
        encode.verify(tmp_path / "out")
    resumed = command("sitfast.encode", *arguments, ranks=2)  # the rest by two ranks
    assert resumed.returncode == 0, resumed.stderr
    assert "36 images in 4 shards of 10; 2 are there already" in resumed.stdout
    assert "36 latents in 4 shards\n" in resumed.stdout
    assert "shard 1 of 1 of this rank" in resumed.stdout  # the two that were missing, shared out
    assert shards(tmp_path / "out") == shards(tmp_path / "straight")
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == [
        *sorted(["manifest.json", *shards(tmp_path / "out")])
    ]
    for name, stat in before.items():
        after = (tmp_path / "out" / name).stat()
        assert (after.st_ino, after.st_mtime_ns) == (stat.st_ino, stat.st_mtime_ns)
    manifests = [json.loads((tmp_path / name / "manifest.json").read_text()) for name in ("straight", "out")]
    assert manifests[0] == manifests[1]


def test_a_damaged_shard_is_made_again_and_verify_finds_a_changed_bit(images, tmp_path):
    out = tmp_path / "out"
    run(out, *images)
    good = shards(out)
    path = out / "shard-00001.safetensors"
    path.write_bytes(path.read_bytes()[:5000])
    with pytest.raises(SitfastError, match="truncated"):
        encode.verify(out)
    run(out, *images)
    assert shards(out) == good and encode.verify(out)["count"] == 36
    run(out, *images)  # nothing is left to do
    assert shards(out) == good
    content = bytearray(good[path.name])
    content[-100] ^= 1
    path.write_bytes(content)
    result = command("sitfast.encode", "--out", str(out), "--verify")
    assert result.returncode == 2 and "shard-00001.safetensors is damaged: its hash is not" in result.stderr


def test_unreadable_images_are_left_out_and_listed(images, image_folder, tmp_path):
    bad = [image_folder / "class0/12.png", image_folder / "class2/20.png"]
    for path in bad:
        path.write_bytes(b"not an image")
    source = data.build_source(config.load(None, images).data)
    paths = [source.name(row) for row in range(36)]
    manifest = run(tmp_path / "out", *images, "data.num_workers=2", shard_rows=1)  # some shards are empty
    assert (manifest["count"], manifest["unreadable"]) == (34, 2)
    listed = (tmp_path / "out/unreadable.txt").read_text().splitlines()
    assert sorted(line.split("\t")[0] for line in listed) == sorted(map(str, bad))
    parts = [load_file(path)["row"] for path in sorted((tmp_path / "out").glob("shard-*"))]
    rows = torch.cat(parts).tolist()
    assert rows == [row for row in range(36) if paths[row] not in map(str, bad)]
    cached = data.build_source(
        config.load(None, [*images, "data.source=latents", f"data.path={tmp_path / 'out'}"]).data
    )
    assert [cached.load(row)[1] for row in range(34)] == [source.load(row)[1] for row in rows]
    with pytest.raises(SitfastError, match=r"1 of 36 images .* more than data.max_unreadable=0.0"):
        run(tmp_path / "strict", *images, "data.max_unreadable=0.0")


def test_texts_are_kept(images, tmp_path):
    datasets = pytest.importorskip("datasets")
    source = data.build_source(config.load(None, images).data)
    pixels = [Image.fromarray(source.load(row)[0].permute(1, 2, 0).numpy()) for row in range(36)]
    texts = [f"image {row}" for row in range(36)]
    table = datasets.Dataset.from_dict({"image": pixels, "label": [0] * 36, "text": texts})
    table.save_to_disk(tmp_path / "saved")
    settings = [*images, "data.source=hf", f"data.path={tmp_path / 'saved'}", "data.caption_column=text"]
    run(tmp_path / "out", *settings)
    cached = data.build_source(
        config.load(None, [*images, "data.source=latents", f"data.path={tmp_path / 'out'}"]).data
    )
    assert [cached.caption(row) for row in range(36)] == texts


def test_what_cannot_be_encoded(images, tmp_path):
    out = tmp_path / "out"
    run(out, *images)
    with pytest.raises(
        SitfastError, match=r"holds other latents \(image_size: 8 → 16; shape: .*\); choose another --out"
    ):
        run(out, *images, "data.image_size=16")
    with pytest.raises(SitfastError, match=r"vae.id=null leaves nothing to encode"):
        run(tmp_path / "b", *images, "vae.id=null")
    with pytest.raises(SitfastError, match=r"data.source=latents leaves nothing to encode"):
        run(tmp_path / "b", *images, "data.source=latents", f"data.path={out}")
    with pytest.raises(SitfastError, match=r"data.image_size=9 is not divisible by 2"):
        run(tmp_path / "b", *images, "data.image_size=9")
    with pytest.raises(SitfastError, match=r"--shard-rows 0 must be at least 1"):
        encode.main(["--out", str(out), "--shard-rows", "0", *images])


def test_latents_beyond_fp16(images, tmp_path):
    model = AutoencoderKL.from_pretrained(next(i for i in images if "vae.id" in i)[7:], low_cpu_mem_usage=False)
    with torch.no_grad():
        model.quant_conv.bias[0] = 1e5
    model.save_pretrained(tmp_path / "large")
    large = [*images, f"vae.id={tmp_path / 'large'}"]
    with pytest.raises(
        SitfastError, match=r"10 images have latents that are not finite in fp16 \(first: row 0\); try --dtype bf16"
    ):
        run(tmp_path / "out", *large)
    assert run(tmp_path / "out", *large, dtype="bf16")["channel_mean"][0] == pytest.approx(1e5, rel=1e-2)


def test_training_from_latents(tiny, images, tmp_path):
    """A run from latents is repeatable, resumes, differs from epoch to epoch by its posterior, and knows its VAE."""
    run(tmp_path / "out", *images)
    settings = [*tiny, *images, "data.source=latents", f"data.path={tmp_path / 'out'}", "data.flip=true",
                "model.num_classes=3", "model.patch_size=2", "train.steps=10", "checkpoint.every=5",
                "data.val_samples=6", "log.val_every=5", "sample.every=10"]  # fmt: skip
    straight = train(*settings)
    assert straight.model.in_channels == 4 and (tmp_path / "run/samples/step-10.png").exists()
    train(*settings, "train.steps=5", f"output_dir={tmp_path / 'b'}")
    train(*settings, "data.num_workers=2", f"output_dir={tmp_path / 'b'}")
    assert losses(tmp_path / "run") == losses(tmp_path / "b") and len(losses(tmp_path / "b")) == 10
    other = tiny_vae(tmp_path / "other", act_fn="relu")
    model = AutoencoderKL.from_pretrained(other, low_cpu_mem_usage=False)
    with torch.no_grad():
        model.encoder.conv_in.weight.mul_(1.5)
    model.save_pretrained(other)
    with pytest.raises(SitfastError, match=r"were made by the VAE .* is another one; name the VAE that made them"):
        train(*settings, f"vae.id={other}", f"output_dir={tmp_path / 'c'}")


def test_cached_latents_are_those_of_encoding_on_the_fly(images, tmp_path):
    run(tmp_path / "out", *images)
    cfg = config.load(None, images)
    vae = build_vae(cfg.vae, device="cpu", seed=5)
    source = data.build_source(cfg.data)
    cached = data.build_source(
        config.load(None, [*images, "data.source=latents", f"data.path={tmp_path / 'out'}"]).data
    )
    rows, index = np.array([3, 35, 11, 12]), torch.tensor([7, 8, 9, 2**40])
    x = torch.stack([source.load(row)[0] for row in rows]).float() / 127.5 - 1
    for mirrored in (False, True):
        moments, _ = cached.gather(rows, torch.full((4,), mirrored))
        expected = vae.encode(x.flip(-1) if mirrored else x, index)
        torch.testing.assert_close(vae.encode(moments, index), expected, rtol=0, atol=1e-3)
