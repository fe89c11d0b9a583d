"""The VAE: a tiny AutoencoderKL saved and loaded again, its posterior drawn with our randomness, and its errors."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL

from sitfast import philox
from sitfast.errors import SitfastError
from sitfast.vae import Pixels, build_vae

SEED = 11


def tiny(**changes):
    torch.manual_seed(0)
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(8, 16),
        norm_num_groups=4,
        layers_per_block=1,
        latent_channels=4,
        sample_size=16,
        **{"scaling_factor": 0.25, **changes},
    )


@pytest.fixture(scope="module")
def model():
    return tiny(shift_factor=0.5)


@pytest.fixture(scope="module")
def saved(model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("vae")
    model.save_pretrained(folder)
    return str(folder)


def build(id, **changes):
    settings = {
        "scale": None,
        "shift": None,
        "posterior": "sample",
        "precision": "fp32",
        "batch_size": 3,
        "compile": None,
        **changes,
    }
    return build_vae(SimpleNamespace(id=id, **settings), device="cpu", seed=SEED)


def images(count=7):
    return torch.from_numpy(np.random.default_rng(0).uniform(-1, 1, (count, 3, 16, 16)).astype(np.float32))


INDEX = torch.tensor([5, 2**40, 0, 17, 18, 19, 123])


def moments(model, x):
    with torch.no_grad():
        mean, logvar = model.quant_conv(model.encoder(x)).double().chunk(2, dim=1)
    return mean, (logvar / 2).exp()


def test_encode_draws_the_posterior_with_our_randomness(model, saved):
    x = images()
    z = build(saved).encode(x, INDEX)
    mean, std = moments(model, x)
    noise = torch.stack([philox.normal(SEED, INDEX[i : i + 1], philox.Stream.VAE, 4, 8, 8)[0] for i in range(7)])
    expected = (mean + std * noise.double() - 0.5) * 0.25
    assert z.dtype == torch.float32 and z.shape == (7, 4, 8, 8)
    torch.testing.assert_close(z.double(), expected, rtol=1e-5, atol=1e-5)
    residual = (z.double() / 0.25 + 0.5 - mean) / std  # what is left is standard normal: 1,792 values
    assert abs(residual.mean()) < 0.1 and abs(residual.std() - 1) < 0.1


def test_the_mean(model, saved):
    x = images()
    expected = (moments(model, x)[0] - 0.5) * 0.25
    z = build(saved, posterior="mean").encode(x, INDEX)
    torch.testing.assert_close(z.double(), expected, rtol=1e-5, atol=1e-5)


def test_a_sample_does_not_depend_on_its_batch(saved):
    x = images()
    vae = build(saved)
    whole = vae.encode(x, INDEX)
    assert torch.equal(whole, vae.encode(x, INDEX))
    order = torch.tensor([6, 2, 0, 5, 1, 4, 3])
    torch.testing.assert_close(vae.encode(x[order], INDEX[order]), whole[order], rtol=1e-5, atol=1e-5)
    parts = [build(saved, batch_size=1).encode(x[i : i + 1], INDEX[i : i + 1]) for i in range(7)]
    torch.testing.assert_close(torch.cat(parts), whole, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(vae.encode(x, INDEX + 1), whole, atol=1e-2)


def test_the_encoder_alone_is_compiled_and_in_equal_parts(saved, monkeypatch):
    plain = build(saved, batch_size=4).encode(images(), INDEX)
    sizes = []
    original = torch.nn.Module.compile

    def backend(graph, examples):
        sizes.append(examples[-1].shape[0])
        return graph

    monkeypatch.setattr(torch.nn.Module, "compile", lambda self, **kwargs: original(self, backend=backend, **kwargs))
    vae = build(saved, batch_size=4, compile=True)
    assert vae.fingerprint == build(saved).fingerprint
    torch.testing.assert_close(vae.encode(images(), INDEX), plain, rtol=1e-5, atol=1e-5)
    assert len(sizes) == 2  # seven images are four and three
    vae.encode(images(6), INDEX[:6])  # three and three
    vae.decode(plain)
    assert len(sizes) == 2


@pytest.mark.gpu
def test_encoding_on_a_gpu_from_any_stream(model, saved):
    settings = SimpleNamespace(
        id=saved, scale=None, shift=None, posterior="mean", precision="bf16", batch_size=3, compile=None
    )
    vae, x = build_vae(settings, device="cuda", seed=SEED), images()
    expected = (moments(model, x)[0] - 0.5) * 0.25
    streams, results = [torch.cuda.Stream() for _ in range(2)], []
    for number in range(6):  # the streams take turns, in batches of every size
        with torch.cuda.stream(streams[number % 2]):
            results.append(vae.encode(x[: 7 - number].cuda(), INDEX[: 7 - number].cuda()))
    torch.cuda.synchronize()
    for z in results:
        assert (z.double().cpu() - expected[: len(z)]).norm() / expected[: len(z)].norm() < 0.05


def test_decode_undoes_scale_and_shift(model, saved):
    z = build(saved).encode(images(), INDEX)
    with torch.no_grad():
        expected = model.decode(z / 0.25 + 0.5).sample
    x = build(saved).decode(z)
    assert x.dtype == torch.float32 and x.shape == (7, 3, 16, 16)
    torch.testing.assert_close(x, expected, rtol=1e-4, atol=1e-5)


def test_scale_and_shift_can_be_given(saved):
    x = images()
    own, given = build(saved), build(saved, scale=(2.0,), shift=(0.0,))
    assert [v.flatten().tolist() for v in (own.scale, own.shift, given.scale, given.shift)] == [
        [0.25],
        [0.5],
        [2.0],
        [0.0],
    ]
    torch.testing.assert_close(given.encode(x, INDEX) / 2, own.encode(x, INDEX) / 0.25 + 0.5, rtol=1e-5, atol=1e-5)


def test_scale_and_shift_of_each_channel(model, saved):
    x, scale, shift = images(), (1.0, 2.0, 3.0, 4.0), (0.1, 0.2, 0.3, 0.4)
    vae = build(saved, scale=scale, shift=shift, posterior="mean")
    z = vae.encode(x, INDEX)
    mean, _ = moments(model, x)
    for channel in range(4):
        expected = (mean[:, channel] - shift[channel]) * scale[channel]
        torch.testing.assert_close(z[:, channel].double(), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(vae.decode(z), model.decode(mean.float()).sample, rtol=1e-4, atol=1e-4)
    with pytest.raises(
        SitfastError, match=r"vae.scale has 3 numbers, and the latents .* have 4 channels; give one number, or 4"
    ):
        build(saved, scale=(1.0, 2.0, 3.0))


def test_cached_moments_take_the_same_road(saved):
    x = images()
    vae = build(saved)
    cached = torch.stack(vae.moments(x), dim=1)
    assert torch.equal(vae.encode(cached, INDEX), vae.encode(x, INDEX))
    half = vae.encode(cached.half(), INDEX)
    assert half.dtype == torch.float32
    torch.testing.assert_close(half, vae.encode(x, INDEX), rtol=0, atol=2e-3)  # fp16 keeps 11 bits of moments below 2


def test_the_fingerprint_is_that_of_the_weights(saved, tmp_path):
    assert build(saved).fingerprint == build(saved, precision="bf16", scale=(3.0,)).fingerprint
    other = tiny(shift_factor=0.5)
    with torch.no_grad():
        other.encoder.conv_in.bias[0] += 0.01
    other.save_pretrained(tmp_path)
    assert build(str(tmp_path)).fingerprint != build(saved).fingerprint


def test_a_config_without_a_shift(tmp_path):
    tiny(scaling_factor=0.18215).save_pretrained(tmp_path)
    vae = build(str(tmp_path))
    assert (vae.scale.item(), vae.shift.item()) == (pytest.approx(0.18215, rel=1e-7), 0.0)


def test_frozen_and_without_gradients(saved):
    vae = build(saved)
    assert not vae.model.training and not any(p.requires_grad for p in vae.model.parameters())
    x = images().requires_grad_()
    z = vae.encode(x, INDEX)
    assert not z.requires_grad and not vae.decode(z).requires_grad
    (z * torch.ones((), requires_grad=True)).sum().backward()  # latents can enter a graph: no inference tensors


def test_bf16(model, saved):
    x = images()
    vae = build(saved, precision="bf16", posterior="mean")
    assert {p.dtype for p in vae.model.parameters()} == {torch.bfloat16}
    z = vae.encode(x, INDEX)
    assert z.dtype == torch.float32 and vae.decode(z).dtype == torch.float32
    expected = (moments(model, x)[0] - 0.5) * 0.25
    error = (z - expected).norm() / expected.norm()
    assert 1e-5 < error < 0.05  # bf16 keeps 8 bits; a dozen layers


def test_the_autocast_of_the_model_does_not_reach_the_vae(saved):
    vae, x = build(saved), images()
    z = vae.encode(x, INDEX)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(vae.encode(x, INDEX), z)
        inside = vae.decode(z)
    assert torch.equal(inside, vae.decode(z))


def test_sizes_and_channels(saved):
    vae = build(saved)
    assert vae.downsample == 2
    assert vae.latent_channels(3) == 4
    with pytest.raises(SitfastError, match=r"the data has 1 channels, but vae.id=.* takes 3; .* vae.id=null"):
        vae.latent_channels(1)
    vae.check_image_size(16)
    with pytest.raises(SitfastError, match=r"data.image_size=17 is not divisible by 2, .*; try 16 or 18$"):
        vae.check_image_size(17)
    with pytest.raises(SitfastError, match=r"; try 2$"):
        vae.check_image_size(1)


def test_pixels_pass_through():
    vae = build(None)
    assert isinstance(vae, Pixels)
    assert (vae.downsample, vae.latent_channels(3), vae.latent_channels(1)) == (1, 3, 1)
    vae.check_image_size(17)
    x = images()
    assert vae.encode(x, INDEX) is x and vae.decode(x) is x


def one_line(id):
    with pytest.raises(SitfastError) as caught:
        build(id)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_folder_without_config(tmp_path):
    assert "is a folder without config.json" in one_line(str(tmp_path))


def test_a_folder_that_does_not_exist(tmp_path):
    assert "is no folder, and a hub id reads owner/name" in one_line(str(tmp_path / "nowhere"))
    assert "is no folder" in one_line("./nowhere")
    assert "is no folder" in one_line("nowhere")


def test_a_hub_id_that_cannot_be_reached(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    message = one_line("sitfast-tests/no-such-vae")
    assert message.startswith("vae.id='sitfast-tests/no-such-vae' cannot be loaded: ")
    assert message.endswith("; check the name and the network, or give a local folder")


def test_a_truncated_file(tmp_path):
    tiny().save_pretrained(tmp_path)
    file = tmp_path / "diffusion_pytorch_model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    assert "cannot be loaded" in one_line(str(tmp_path))


def test_missing_weights_are_not_left_to_chance(tmp_path):
    tiny(use_quant_conv=False).save_pretrained(tmp_path)
    config = tmp_path / "config.json"
    config.write_text(config.read_text().replace('"use_quant_conv": false', '"use_quant_conv": true'))
    assert "has no weights for 2 tensors of an AutoencoderKL (quant_conv.bias" in one_line(str(tmp_path))


def test_a_pickle_is_not_read(tmp_path):
    tiny().save_pretrained(tmp_path, safe_serialization=False)
    assert "cannot be loaded" in one_line(str(tmp_path))
