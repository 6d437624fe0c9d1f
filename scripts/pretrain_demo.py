"""Make the demo model from nothing: tokenizer, autoencoder, classifier, text encoders and UNet.

    python scripts/pretrain_demo.py --work build/demo            # every stage that is not done yet
    python scripts/pretrain_demo.py --work build/demo --stage evaluate
    python scripts/pretrain_demo.py --work build/demo --install  # fp16 copy into mapo_core/demo/

Each stage writes into the work folder and is skipped when its result is there; the UNet stage also continues from
its last checkpoint. Times on 2 cores of an AMD EPYC are in docs/demo-model.md.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import random
import shutil
import sys
import time
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import (
    AutoencoderKL,
    DDPMScheduler,
    EulerDiscreteScheduler,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from mapo_core.demo import classifier as clf  # noqa: E402
from mapo_core.demo import scenes as world  # noqa: E402

DEMO = ROOT / "mapo_core" / "demo"
CLIP_VOCABULARY = ROOT / "mapo_core" / "families" / "assets" / "clip_tokenizer"
NOISE = {
    "num_train_timesteps": 1000,
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "prediction_type": "epsilon",
}
MAX_TOKENS = 32


def pictures(drawn: list[tuple[world.Scene, str]]) -> Tensor:
    """Scenes with their styles as [N, 3, 64, 64] uint8."""
    stack = np.stack([np.asarray(world.render(scene, style)) for scene, style in drawn])
    return torch.from_numpy(stack).permute(0, 3, 1, 2).contiguous()


def draw_set(seed: int, count: int, styles: tuple[str, ...], weights: tuple[float, ...] | None = None, **kwargs):
    """`count` training scenes, each with a style."""
    stream, rng = world.scenes(seed, held_out=False, **kwargs), random.Random(seed + 1)
    return [(next(stream), rng.choices(styles, weights)[0]) for _ in range(count)]


# --- tokenizer -------------------------------------------------------------------------------------------------------


def build_tokenizer(out: Path) -> None:
    """CLIP's tokenizer with its alphabet and only the merges that the captions use; other words become letters."""
    merges = (CLIP_VOCABULARY / "merges.txt").read_text(encoding="utf-8").splitlines()[1:]
    full = list(json.loads((CLIP_VOCABULARY / "vocab.json").read_text(encoding="utf-8")))
    words = {w for name in (*world.COLOURS, *world.BACKGROUNDS, *world.OBJECTS, *world.STYLES) for w in name.split()}
    words |= set("a an on the left right at top bottom big small of above background style".split())
    rank = {tuple(m.split()): i for i, m in enumerate(merges)}
    used: set[int] = set()
    for word in words:
        symbols = [*word[:-1], word[-1] + "</w>"]
        while True:
            found = [(rank[p], p) for p in pairwise(symbols) if p in rank]
            if not found:
                break
            index, pair = min(found)
            used.add(index)
            at = next(i for i in range(len(symbols) - 1) if (symbols[i], symbols[i + 1]) == pair)
            symbols[at : at + 2] = ["".join(pair)]
    kept = [merges[i] for i in sorted(used)]
    vocabulary = [*full[:512], *("".join(m.split()) for m in kept), "<|startoftext|>", "<|endoftext|>"]
    source = out / "tokenizer"  # vocab.json and merges.txt: transformers 4 and 5 both read these
    source.mkdir(parents=True, exist_ok=True)
    (source / "vocab.json").write_text(json.dumps({t: i for i, t in enumerate(vocabulary)}), encoding="utf-8")
    (source / "merges.txt").write_text("#version: 0.2\n" + "\n".join(kept) + "\n", encoding="utf-8")
    tokenizer = CLIPTokenizer.from_pretrained(source, model_max_length=MAX_TOKENS)
    ids = tokenizer("a big red star on the left, blue background").input_ids
    assert len(ids) == 12, tokenizer.convert_ids_to_tokens(ids)
    ends = {"bos_token": "<|startoftext|>", **dict.fromkeys(("eos_token", "pad_token", "unk_token"), "<|endoftext|>")}
    config = {**ends, "model_max_length": MAX_TOKENS, "tokenizer_class": "CLIPTokenizer"}
    (source / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


# --- autoencoder -----------------------------------------------------------------------------------------------------


@torch.no_grad()
def start_as_pooling(vae: AutoencoderKL) -> None:
    """Initialise the autoencoder as average pooling down and nearest-neighbour up, plus a little noise.

    With the default initialisation its single-group norms hide the absolute colour and training stalls at 20 dB; two
    constant channels give the norms a reference.
    """

    def near_identity(conv: nn.Conv2d, noise: float) -> None:
        conv.weight.mul_(noise)
        middle = conv.weight.shape[2] // 2
        for c in range(min(conv.weight.shape[:2])):
            conv.weight[c, c, middle, middle] += 1

    for name, module in vae.named_modules():
        if not isinstance(module, nn.Conv2d):
            continue
        if name.endswith(".conv2"):
            module.weight.mul_(0.1)
            module.bias.zero_()
        elif name.endswith(("conv_shortcut", "upsamplers.0.conv")):
            near_identity(module, 0.1)
        elif name.endswith("downsamplers.0.conv"):  # diffusers pads right and below: taps 0 and 1 are the 2x2 block
            module.weight.mul_(0.3)
            for c in range(module.weight.shape[0]):
                module.weight[c, c, :2, :2] += 0.25
    for half in (vae.encoder, vae.decoder):
        near_identity(half.conv_in, 0.5)
        near_identity(half.conv_out, 0.3)
        half.conv_in.bias[-2] += 2
        half.conv_in.bias[-1] -= 2
    near_identity(vae.quant_conv, 0.1)
    near_identity(vae.post_quant_conv, 0.1)
    vae.quant_conv.weight[4:] *= 0.1
    vae.quant_conv.bias[4:] = -5  # log variance: start almost noiseless


def train_vae(out: Path, steps: int = 5200) -> None:
    """An AutoencoderKL of 0.4 M parameters: 64x64x3 -> 16x16x4."""
    torch.manual_seed(0)
    rng = random.Random(0)
    vae = AutoencoderKL(
        in_channels=3,
        out_channels=3,
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(16, 32, 48),
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=1,
        sample_size=world.SIZE,
        mid_block_add_attention=False,
    )
    start_as_pooling(vae)
    data = pictures(draw_set(10, 8000, world.STYLES))
    held_out = pictures([(s, world.STYLES[i % 4]) for i, s in enumerate(world.evaluation_scenes(128, seed=5))])
    peak_lr = 2e-3
    optimizer = torch.optim.AdamW(vae.parameters(), lr=peak_lr, betas=(0.9, 0.99), weight_decay=1e-4)
    started = time.perf_counter()
    for step in range(steps):
        done = step / steps
        for group in optimizer.param_groups:
            group["lr"] = peak_lr * min(1.0, (step + 1) / 50) * (1 - done) ** 0.8 + 2e-5
        side, count = (32, 16) if done < 0.75 else (64, 4)  # small crops first: four times as many a second
        top, left = rng.randint(0, 64 - side), rng.randint(0, 64 - side)
        x = data[torch.randint(0, len(data), (count,)), :, top : top + side, left : left + side].float() / 127.5 - 1
        posterior = vae.encode(x).latent_dist
        y = vae.decode(posterior.sample()).sample
        edges = sum((x.diff(dim=d) - y.diff(dim=d)).abs().mean() for d in (2, 3))
        kl = posterior.kl().mean() / posterior.mean[0].numel()
        loss = (x - y).abs().mean() + 0.5 * edges + 0.5 * F.mse_loss(y, x) + 2e-4 * kl
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimizer.step()
        if step % 200 == 0 or step == steps - 1:
            print(f"vae {step} {time.perf_counter() - started:.0f} s psnr {psnr(vae, held_out):.2f} dB", flush=True)
    with torch.no_grad():
        latents = torch.cat([vae.encode(b.float() / 127.5 - 1).latent_dist.mean for b in data[:2048].split(64)])
    vae.register_to_config(scaling_factor=1 / latents.std().item(), force_upcast=False)
    vae.save_pretrained(out / "vae")


@torch.no_grad()
def psnr(vae: AutoencoderKL, data: Tensor) -> float:
    """Peak signal-to-noise ratio of the round trip, dB; data is uint8."""
    x = data.float() / 127.5 - 1
    y = vae.decode(vae.encode(x).latent_dist.mean).sample.clamp(-1, 1)
    return (-10 * torch.log10(((x - y) / 2).pow(2).mean())).item()


# --- classifier ------------------------------------------------------------------------------------------------------


def train_classifier(out: Path, steps: int = 2000) -> None:
    """The judge: trained on real renders (a third of them through the autoencoder), validated on held-out ones."""
    torch.manual_seed(0)
    vae = AutoencoderKL.from_pretrained(out / "vae").eval()

    def prepare(drawn: list[tuple[world.Scene, str]], through_vae: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        x = pictures(drawn).float() / 127.5 - 1
        if through_vae:
            with torch.no_grad():
                x = torch.cat([vae.decode(vae.encode(b).latent_dist.mean).sample.clamp(-1, 1) for b in x.split(100)])
        owner = torch.tensor([i for i, (scene, _) in enumerate(drawn) for _ in scene.things])
        regions = torch.cat([clf.regions_of(scene) for scene, _ in drawn])
        labels = torch.cat([clf.labels_of(scene, style) for scene, style in drawn])
        return x, owner, regions, labels

    sets = [prepare(draw_set(20, 6000, world.STYLES), False), prepare(draw_set(21, 3000, world.STYLES), True)]
    model = clf.SceneClassifier()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.02)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 6e-3, steps)
    rng = random.Random(0)
    started = time.perf_counter()
    for step in range(steps):
        images, owner, regions, labels = sets[step % 3 == 2]
        index = torch.randint(0, len(owner), (64,))
        x = images[owner[index]]
        if rng.random() < 0.3:
            x = 0.5 * x + 0.5 * F.avg_pool2d(F.pad(x, (1, 1, 1, 1), mode="replicate"), 3, 1)
        x = x + torch.randn_like(x) * rng.choice([0.0, 0.03, 0.08])
        logits = model(x, regions[index])
        losses = [F.cross_entropy(logits[name], labels[index, i]) for i, name in enumerate(clf.HEADS)]
        loss = torch.stack(losses).sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        if step % 200 == 0:
            print(f"classifier {step} {time.perf_counter() - started:.0f} s loss {loss.item():.3f}", flush=True)
    save_file({k: v.contiguous() for k, v in model.state_dict().items()}, out / "classifier.safetensors")
    report = validate_classifier(model.eval(), vae)
    (out / "classifier.json").write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    print("classifier", report, flush=True)


def validate_classifier(model: clf.SceneClassifier, vae: AutoencoderKL) -> dict[str, float]:
    """Accuracy on 400 held-out scenes in every style, as rendered and after the autoencoder."""
    report: dict[str, float] = {}
    held_out = world.evaluation_scenes(400, seed=77)
    for style in world.STYLES:
        plain = [world.render(s, style) for s in held_out]
        x = pictures([(s, style) for s in held_out]).float() / 127.5 - 1
        with torch.no_grad():
            y = torch.cat([vae.decode(vae.encode(b).latent_dist.mean).sample.clamp(-1, 1) for b in x.split(100)])
        decoded = to_pictures(y)
        for name, images in (("renders", plain), ("through the autoencoder", decoded)):
            scores = clf.score_pictures(images, held_out, model)
            report[f"{style}, {name}: object and colour"] = float(scores.both.mean())
            report[f"{style}, {name}: style"] = float((scores.styles.argmax(1) == world.STYLES.index(style)).mean())
    return report


def to_pictures(x: Tensor) -> list[Image.Image]:
    """[N, 3, H, W] in [-1, 1] as PIL images."""
    arrays = ((x + 1) * 127.5).round().clamp(0, 255).byte().permute(0, 2, 3, 1).numpy()
    return [Image.fromarray(a) for a in arrays]


# --- text encoders and UNet ------------------------------------------------------------------------------------------


def build_networks(tokenizer: CLIPTokenizer) -> nn.ModuleDict:
    """SDXL's classes at a hundredth of its width."""
    text = dict(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=160,
        num_hidden_layers=3,
        num_attention_heads=4,
        max_position_embeddings=MAX_TOKENS,
        projection_dim=64,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    unet = UNet2DConditionModel(
        sample_size=16,
        in_channels=4,
        out_channels=4,
        layers_per_block=1,
        block_out_channels=(32, 64, 128),
        down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
        transformer_layers_per_block=[1, 1, 1],
        attention_head_dim=(2, 4, 4),
        use_linear_projection=True,
        cross_attention_dim=128,
        norm_num_groups=8,
        addition_embed_type="text_time",
        addition_time_embed_dim=16,
        projection_class_embeddings_input_dim=16 * 6 + 64,
    )
    return nn.ModuleDict(
        {
            "unet": unet,
            "text_encoder": CLIPTextModel(CLIPTextConfig(**text, hidden_act="quick_gelu")),
            "text_encoder_2": CLIPTextModelWithProjection(CLIPTextConfig(**text, hidden_act="gelu")),
        }
    )


def encode_text(nets: nn.ModuleDict, ids: Tensor) -> tuple[Tensor, Tensor]:
    """As SDXL: the last hidden states but one of both encoders [B, T, 128], the projection of the second [B, 64]."""
    first = nets["text_encoder"](ids, output_hidden_states=True).hidden_states[-2]
    second = nets["text_encoder_2"](ids, output_hidden_states=True)
    return torch.cat([first, second.hidden_states[-2]], dim=-1), second.text_embeds


def prepare_latents(out: Path, tokenizer: CLIPTokenizer, count: int) -> tuple[Tensor, Tensor]:
    """Latents [N, 4, 16, 16] and token ids [N, 32] of the training scenes; kept on disk."""
    cached = out / "latents.pt"
    if cached.exists():
        stored = torch.load(cached, weights_only=True)
        return stored["latents"], stored["ids"]
    vae = AutoencoderKL.from_pretrained(out / "vae").eval()
    drawn = draw_set(30, count, ("plain", *world.NAMED_STYLES), (0.6, 0.2, 0.2), two_objects=0.5)
    latents: list[Tensor] = []
    with torch.no_grad():
        for i in range(0, count, 100):
            x = pictures(drawn[i : i + 100]).float() / 127.5 - 1
            latents.append(vae.encode(x).latent_dist.mean * vae.config.scaling_factor)
    captions = [world.styled_caption(scene, style) for scene, style in drawn]
    ids = tokenizer(captions, padding="max_length", max_length=MAX_TOKENS, return_tensors="pt").input_ids
    assert ids.shape[1] == MAX_TOKENS
    torch.save({"latents": torch.cat(latents), "ids": ids}, cached)
    return torch.cat(latents), ids


def train_unet(out: Path, steps: int, scenes: int) -> None:
    """UNet and text encoders together: epsilon prediction, min-SNR weighting, EMA, 10 % empty captions."""
    tokenizer = CLIPTokenizer.from_pretrained(out / "tokenizer")
    latents, ids = prepare_latents(out, tokenizer, scenes)
    empty = tokenizer("", padding="max_length", max_length=MAX_TOKENS, return_tensors="pt").input_ids
    torch.manual_seed(0)
    nets = build_networks(tokenizer)
    ema = copy.deepcopy(nets).requires_grad_(False)
    parameters, averages = list(nets.parameters()), list(ema.parameters())
    peak_lr, batch_size, warmup = 1.2e-3, 16, 300
    optimizer = torch.optim.AdamW(parameters, lr=peak_lr, betas=(0.9, 0.99), weight_decay=0.01, fused=True)
    generator = torch.Generator().manual_seed(0)
    noise_scheduler = DDPMScheduler(**NOISE, clip_sample=False)
    snr = noise_scheduler.alphas_cumprod / (1 - noise_scheduler.alphas_cumprod)
    weights = snr.clamp(max=5) / snr
    state_file, start, spent = out / "unet_state.pt", 0, 0.0
    if state_file.exists():
        state = torch.load(state_file, weights_only=True)
        nets.load_state_dict(state["nets"])
        ema.load_state_dict(state["ema"])
        optimizer.load_state_dict(state["optimizer"])
        generator.set_state(state["generator"])
        start, spent = state["step"], state["seconds"]
    add_time_ids = torch.tensor([[64, 64, 0, 0, 64, 64]], dtype=torch.float32).expand(batch_size, -1)
    started, running = time.perf_counter() - spent, 0.0
    for step in range(start, steps):
        progress = step / steps
        for group in optimizer.param_groups:
            cosine = 0.5 * (1 + math.cos(math.pi * progress))
            group["lr"] = peak_lr * min(1.0, (step + 1) / warmup) * cosine + 1e-5
        index = torch.randint(0, len(latents), (batch_size,), generator=generator)
        noise = torch.randn((batch_size, 4, 16, 16), generator=generator)
        timesteps = torch.randint(0, 1000, (batch_size,), generator=generator)
        drop = torch.rand(batch_size, generator=generator) < 0.1
        tokens = torch.where(drop[:, None], empty, ids[index])
        prompt_embeds, pooled = encode_text(nets, tokens)
        noisy = noise_scheduler.add_noise(latents[index], noise, timesteps)
        conditions = {"time_ids": add_time_ids, "text_embeds": pooled}
        model_pred = nets["unet"](noisy, timesteps, prompt_embeds, added_cond_kwargs=conditions).sample
        mse = (model_pred - noise).pow(2).mean((1, 2, 3))
        loss = (mse * weights[timesteps]).mean()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        torch._foreach_lerp_(averages, parameters, 1 - min(0.999, (1 + step) / (10 + step)))
        running += (mse.detach().mean().item() - running) / min(step - start + 1, 200)
        if (step + 1) % 200 == 0:
            print(f"unet {step + 1}/{steps} {time.perf_counter() - started:.0f} s mse {running:.4f}", flush=True)
        if (step + 1) % 1000 == 0 or step + 1 == steps:
            state = dict(nets=nets.state_dict(), ema=ema.state_dict(), optimizer=optimizer.state_dict())
            state |= dict(generator=generator.get_state(), step=step + 1, seconds=time.perf_counter() - started)
            torch.save(state, state_file.with_suffix(".tmp"))
            state_file.with_suffix(".tmp").replace(state_file)
            save_pipeline(out, tokenizer, ema)
    (out / "unet.json").write_text(json.dumps({"steps": steps, "seconds": time.perf_counter() - started}) + "\n")


def save_pipeline(out: Path, tokenizer: CLIPTokenizer, nets: nn.ModuleDict) -> None:
    """The whole model as a diffusers folder, fp16."""
    scheduler = EulerDiscreteScheduler(**NOISE, timestep_spacing="trailing", steps_offset=1)
    pipe = StableDiffusionXLPipeline(
        vae=AutoencoderKL.from_pretrained(out / "vae"),
        text_encoder=copy.deepcopy(nets["text_encoder"]),
        text_encoder_2=copy.deepcopy(nets["text_encoder_2"]),
        tokenizer=tokenizer,
        tokenizer_2=tokenizer,
        unet=copy.deepcopy(nets["unet"]),
        scheduler=scheduler,
        force_zeros_for_empty_prompt=False,
        add_watermarker=False,
    )
    pipe.to(torch.float16)
    pipe.save_pretrained(out / "model", safe_serialization=True)
    for name in ("tokenizer", "tokenizer_2"):  # as we wrote it: transformers 5 saves a form that 4 cannot read
        shutil.rmtree(out / "model" / name)
        shutil.copytree(out / "tokenizer", out / "model" / name)


# --- evaluation ------------------------------------------------------------------------------------------------------


def generate(pipe: StableDiffusionXLPipeline, prompts: list[str], seed: int = 0) -> list[Image.Image]:
    """One picture per prompt; the noise belongs to its place in the list."""
    pipe.set_progress_bar_config(disable=True)
    images: list[Image.Image] = []
    for i in range(0, len(prompts), 25):
        part = prompts[i : i + 25]
        generators = [torch.Generator().manual_seed(seed * 100_000 + i + j) for j in range(len(part))]
        images += pipe(
            part, num_inference_steps=16, guidance_scale=4.0, height=64, width=64, generator=generators
        ).images
    return images


def evaluate(out: Path, count: int = 200) -> None:
    """Held-out captions, none of whose combinations was trained on; named styles; the picture sheet."""
    started = time.perf_counter()
    pipe = StableDiffusionXLPipeline.from_pretrained(out / "model", torch_dtype=torch.float32)
    judge = clf.load_classifier(out / "classifier.safetensors")
    held_out = world.evaluation_scenes(count, seed=99)
    images = generate(pipe, [s.caption for s in held_out])
    scores = clf.score_pictures(images, held_out, judge)
    two = np.array([len(s.things) == 2 for s in held_out])
    report = {
        "captions": count,
        "two-object captions": int(two.sum()),
        "object and colour right": float(scores.both.mean()),
        "object right": float(scores.objects.mean()),
        "colour right": float(scores.colours.mean()),
        "background right": float(scores.background.mean()),
        "one-object captions right": float(scores.both[~two].mean()),
        "two-object captions right": float(scores.both[two].mean()),
        **{f"{s} style, unnamed": float(scores.style(s).mean()) for s in world.STYLES},
    }
    for style in world.NAMED_STYLES:
        named = held_out[:: count // 40]
        drawn = generate(pipe, [world.styled_caption(s, style) for s in named])
        report[f"{style} style, named"] = float(clf.score_pictures(drawn, named, judge).style(style).mean())
        images += drawn[:10]
    report["seconds"] = round(time.perf_counter() - started, 1)
    (out / "evaluation.json").write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(report, indent=2), flush=True)
    columns, tile = 20, world.SIZE * 2
    shown = [*images[:60], *images[count - 40 : count], *images[count:]]
    sheet = Image.new("RGB", (columns * (tile + 4), math.ceil(len(shown) / columns) * (tile + 4)), "white")
    for i, image in enumerate(shown):
        place = (i % columns * (tile + 4) + 2, i // columns * (tile + 4) + 2)
        sheet.paste(image.resize((tile, tile), Image.Resampling.NEAREST), place)
    sheet.save(out / "evaluation.png")
    (out / "evaluation_captions.txt").write_text("\n".join(s.caption for s in held_out) + "\n", encoding="utf-8")


def install(out: Path) -> None:
    """Copy the model and the classifier into the package."""
    import shutil

    target = DEMO / "model"
    if target.exists():
        shutil.rmtree(target)
    shutil.copytree(out / "model", target)
    shutil.copy(out / "classifier.safetensors", clf.CLASSIFIER_FILE)
    total = sum(f.stat().st_size for f in target.rglob("*") if f.is_file())
    print(f"installed {target}: {total / 1e6:.1f} MB")


def main() -> None:
    """Run the stages that are asked for or not done yet."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=Path("build/demo"))
    parser.add_argument("--stage", choices=["tokenizer", "vae", "classifier", "unet", "evaluate"])
    parser.add_argument("--steps", type=int, default=12_000, help="UNet steps of 16 pictures")
    parser.add_argument("--scenes", type=int, default=40_000, help="training scenes")
    parser.add_argument("--install", action="store_true", help="copy the finished model into the package")
    args = parser.parse_args()
    out: Path = args.work
    out.mkdir(parents=True, exist_ok=True)
    stages = {
        "tokenizer": (out / "tokenizer", lambda: build_tokenizer(out)),
        "vae": (out / "vae", lambda: train_vae(out)),
        "classifier": (out / "classifier.safetensors", lambda: train_classifier(out)),
        "unet": (out / "unet.json", lambda: train_unet(out, args.steps, args.scenes)),
        "evaluate": (out / "evaluation.json", lambda: evaluate(out)),
    }
    if args.install:
        install(out)
        return
    for name, (result, action) in stages.items():
        if args.stage == name or (args.stage is None and not result.exists()):
            started = time.perf_counter()
            action()
            print(f"{name}: {time.perf_counter() - started:.0f} s", flush=True)


if __name__ == "__main__":
    main()
