"""From a sound wave to tokens: frames, Fourier transform, mel scale, logarithm, patches.

A microphone writes 16,000 numbers a second; no encoder reads those one by one. Nor does the ear:
it splits sound by frequency, hears equal ratios as equal steps (above about 1,000 Hz; below, equal
differences), and loudness as a logarithm. The log-mel spectrogram copies the three, in this order:

    waveform --frames, window, Fourier--> power of each frequency, 100 times a second
             --mel filterbank-----------> power of 80 or so bands, narrow below, wide above
             --logarithm----------------> an image, mels × frames, that a Vision Transformer reads

Each arrow loses something: the window blurs time, the power forgets the phase, the bands blur the
pitch of high notes. `invert_log_mel` lets you hear how much.
"""

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from mmlearn.transformer import check_finite


def _check_positive(**sizes: int | float) -> None:
    for name, value in sizes.items():
        if not value > 0:
            raise ValueError(f"{name}={value} is not positive; give a number above zero")


@dataclass(frozen=True)
class MelConfig:
    """How a waveform becomes a log-mel spectrogram. Defaults: speech, 100 frames a second.

    `win_length` samples are seen at a time (None: all `n_fft`; fewer are padded with zeros on both
    sides), every `hop_length` samples. `power` 2 gives energies, 1 magnitudes. `center` puts frame
    i around sample i * hop_length, by mirroring the sound at its ends; without it, frame i starts
    there. `pad` zeros are added at both ends before that. The logarithm is ln(mel + log_offset), or
    with `decibels` 10 log10 of an energy, cut off at -100 dB (20 log10 of a magnitude, cut off at
    -200 dB). Frequencies are in hertz; `f_max` None means half the sampling rate, above which a
    sampled wave holds nothing.

    Raises: ValueError for a size that makes no spectrogram.
    """

    sample_rate: int = 16_000
    n_fft: int = 400
    win_length: int | None = None
    hop_length: int = 160
    n_mels: int = 80
    f_min: float = 0.0
    f_max: float | None = None
    power: float = 2.0
    center: bool = True
    pad: int = 0
    mel_scale: str = "htk"
    norm: str | None = None
    log_offset: float = 1e-6
    decibels: bool = False

    def __post_init__(self):
        _check_positive(
            sample_rate=self.sample_rate,
            n_fft=self.n_fft,
            hop_length=self.hop_length,
            n_mels=self.n_mels,
            power=self.power,
            log_offset=self.log_offset,
        )
        if not 0 < self.window_length <= self.n_fft:
            raise ValueError(
                f"win_length={self.win_length} does not lie between 1 and n_fft={self.n_fft}; "
                "a window longer than the Fourier transform would be cut"
            )
        if self.pad < 0:
            raise ValueError(f"pad={self.pad} is negative; give the zeros to add at each end")

    @property
    def window_length(self) -> int:
        """The samples seen at a time."""
        return self.n_fft if self.win_length is None else self.win_length

    @property
    def shortest(self) -> int:
        """The fewest samples that make a frame."""
        # Mirroring n_fft // 2 samples needs one more than that to mirror around.
        needed = self.n_fft // 2 + 1 if self.center else self.n_fft
        return max(1, needed - 2 * self.pad)

    def num_frames(self, num_samples: int) -> int:
        """Return how many frames a waveform of this many samples gives."""
        padded = num_samples + 2 * self.pad + (2 * (self.n_fft // 2) if self.center else 0)
        return (padded - self.n_fft) // self.hop_length + 1


def check_waveforms(waveforms: Float[Tensor, "B samples"], shortest: int = 1) -> None:
    """Refuse waveforms that no encoder can read, and say why.

    Raises: ValueError for a wrong rank, an empty batch, too few samples, or a sample that is NaN
    or infinite (with its place): one such sample would make every frame around it NaN.
    """
    shape = tuple(waveforms.shape)
    if waveforms.ndim != 2 or shape[0] == 0:
        raise ValueError(
            f"waveforms have shape {shape}, wanted (batch, samples) with a batch of at least 1; "
            "index a single sound as waveform[None], and average stereo channels first"
        )
    if shape[1] < shortest:
        raise ValueError(
            f"waveforms hold {shape[1]} samples, but at least {shortest} are needed; "
            "pad them with zeros, or choose a shorter window"
        )
    check_finite(waveforms, "waveforms")


def hann_window(length: int) -> Float[Tensor, "length"]:
    r"""Fade a frame in and out, so that its ends do not click.

    $$ w_n = \tfrac12 - \tfrac12 \cos\!\left(\frac{2\pi n}{N}\right), \qquad n = 0 \dots N - 1 $$

    The Fourier transform takes a frame to repeat for ever; without a window, the jump from its last
    sample to its first spreads over all frequencies. This is the *periodic* window: dividing by N
    makes copies shifted by N/2 (N even) add up to exactly 1. The symmetric one divides by N - 1.
    Source: Harris 1978, "On the Use of Windows for Harmonic Analysis", section V, cosine windows.
    """
    n = torch.arange(length, dtype=torch.float64)
    return (0.5 - 0.5 * torch.cos(2 * math.pi * n / length)).to(torch.get_default_dtype())


def fourier_matrix(
    n_fft: int,
) -> tuple[Float[Tensor, "frequencies n_fft"], Float[Tensor, "frequencies n_fft"]]:
    r"""Return the discrete Fourier transform as two matrices, of cosines and of sines.

    $$ X_k = \sum_{n=0}^{N-1} x_n e^{-2\pi i kn/N}
           = \sum_n x_n \cos\frac{2\pi kn}{N} - i \sum_n x_n \sin\frac{2\pi kn}{N} $$

    Row k asks the frame: how much of you is a wave that swings k times from end to end? A wave may
    start anywhere, so it takes a cosine and a sine; $|X_k|^2$ is the same wherever it starts. For
    real samples the rows above N/2 mirror those below, so there are N/2 + 1.

    `frames @ cosines.T` is the real part, `-frames @ sines.T` the imaginary one. The fast Fourier
    transform (torch.fft.rfft) returns the same in N log N multiplications instead of N².
    Source: Oppenheim and Schafer, "Discrete-Time Signal Processing", chapter 8.
    """
    k, n = torch.arange(n_fft // 2 + 1)[:, None], torch.arange(n_fft)
    # Whole turns do not count. Dropping them as integers keeps the angle exact for large k n.
    angles = 2 * math.pi * ((k * n) % n_fft).double() / n_fft
    dtype = torch.get_default_dtype()
    return angles.cos().to(dtype), angles.sin().to(dtype)


def spectrogram(
    waveforms: Float[Tensor, "B samples"], config: MelConfig
) -> Float[Tensor, "B frequencies frames"]:
    r"""Measure the power of every frequency in every frame.

    $$ S_{k,t} = \Big| \sum_{n} w_n\, x_{t h + n}\, e^{-2\pi i kn/N} \Big|^{p} $$

    Frequency k is k * sample_rate / n_fft hertz. A longer window tells frequencies apart better and
    moments worse: the product of the two blurs is bounded from below.
    Raises: ValueError as `check_waveforms` does.
    """
    check_waveforms(waveforms, config.shortest)
    waveforms = F.pad(waveforms, (config.pad, config.pad))
    if config.center:
        waveforms = F.pad(waveforms, (config.n_fft // 2, config.n_fft // 2), mode="reflect")
    frames = waveforms.unfold(-1, config.n_fft, config.hop_length)  # a view: nothing is copied
    spectrum = torch.fft.rfft(frames * _padded_window(config).to(frames))
    return spectrum.abs().pow(config.power).transpose(1, 2)


# Slaney's scale: straight up to 1000 Hz, 15 mels there; then a factor of 6.4 every 27 mels.
SLANEY_HERTZ_PER_MEL = 200 / 3
SLANEY_BREAK_MEL = 15.0
SLANEY_LOG_STEP = math.log(6.4) / 27


def hertz_to_mel(hertz: Float[Tensor, "*any"], mel_scale: str = "htk") -> Float[Tensor, "*any"]:
    r"""Map frequency to the mel scale, on which equal steps sound equally far apart.

    $$ m_{\text{HTK}} = 2595 \log_{10}(1 + f / 700) $$

    Slaney's scale (librosa's default) is exactly linear up to 1000 Hz and logarithmic above; the
    two are numbered differently, so never mix them.
    Raises: ValueError for another `mel_scale`.
    Source: O'Shaughnessy 1987, for HTK's; Slaney 1998, "Auditory Toolbox", for the other.
    """
    _check_scale(mel_scale)
    if mel_scale == "htk":
        return 2595.0 * torch.log10(1 + hertz / 700.0)
    linear = hertz / SLANEY_HERTZ_PER_MEL
    above = SLANEY_BREAK_MEL + torch.log(hertz.clamp(min=1000.0) / 1000.0) / SLANEY_LOG_STEP
    return torch.where(hertz < 1000.0, linear, above)


def mel_to_hertz(mels: Float[Tensor, "*any"], mel_scale: str = "htk") -> Float[Tensor, "*any"]:
    """Undo `hertz_to_mel`."""
    _check_scale(mel_scale)
    if mel_scale == "htk":
        return 700.0 * (10.0 ** (mels / 2595.0) - 1)
    above = 1000.0 * torch.exp((mels - SLANEY_BREAK_MEL) * SLANEY_LOG_STEP)
    return torch.where(mels < SLANEY_BREAK_MEL, mels * SLANEY_HERTZ_PER_MEL, above)


def mel_filterbank(config: MelConfig) -> Float[Tensor, "mels frequencies"]:
    r"""Return one triangle a band: which frequencies it collects, and how much of each.

    $$ W_{m,k} = \max\!\Big(0, \min\!\Big(\frac{f_k - c_{m-1}}{c_m - c_{m-1}},
                                         \frac{c_{m+1} - f_k}{c_{m+1} - c_m}\Big)\Big) $$

    The corners $c$ stand at equal steps in mels, so that triangles are narrow at low frequencies
    and wide at high ones; each ends where its neighbours peak. `norm="slaney"` divides each by half
    its width, so that white noise fills all bands equally.

    Raises: ValueError for frequencies out of order, and for a band so narrow that no frequency of
    the Fourier transform falls into it: it would be silent for ever. (torchaudio warns, and goes
    on.)
    Source: Davis and Mermelstein 1980; Slaney 1998 for the norm.
    """
    nyquist = config.sample_rate / 2
    f_max = nyquist if config.f_max is None else config.f_max
    if not 0 <= config.f_min < f_max <= nyquist:
        raise ValueError(
            f"f_min={config.f_min} and f_max={f_max} do not lie in order between 0 and half the "
            f"sampling rate, {nyquist} Hz; no frequency above that is in the samples"
        )
    if config.norm not in (None, "slaney"):
        raise ValueError(f"norm={config.norm!r} is not known; choose None or 'slaney'")
    ends = hertz_to_mel(torch.tensor([config.f_min, f_max], dtype=torch.float64), config.mel_scale)
    steps = torch.linspace(0, 1, config.n_mels + 2, dtype=torch.float64)
    corners = mel_to_hertz(ends[0] + steps * (ends[1] - ends[0]), config.mel_scale)
    frequencies = torch.arange(config.n_fft // 2 + 1) * (config.sample_rate / config.n_fft)

    left, peak, right = corners[:-2, None], corners[1:-1, None], corners[2:, None]
    rising, falling = (frequencies - left) / (peak - left), (right - frequencies) / (right - peak)
    triangles = torch.minimum(rising, falling).clamp(min=0)
    if config.norm == "slaney":
        triangles = triangles * 2 / (right - left)
    if (empty := triangles.sum(dim=1) == 0).any():
        band = int(empty.int().argmax())
        raise ValueError(
            f"n_mels={config.n_mels} is too many for n_fft={config.n_fft}: band {band} "
            f"({corners[band]:.0f} to {corners[band + 2]:.0f} Hz) lies between two frequencies of "
            f"the Fourier transform, {config.sample_rate / config.n_fft:.1f} Hz apart; take fewer "
            "bands or a longer n_fft"
        )
    return triangles.to(torch.get_default_dtype())


def mel_spectrogram(
    waveforms: Float[Tensor, "B samples"], config: MelConfig
) -> Float[Tensor, "B mels frames"]:
    r"""Collect the power of each frame in mel bands: $M = W S$.

    Raises: ValueError as `check_waveforms` and `mel_filterbank` do.
    """
    power = spectrogram(waveforms, config)
    return mel_filterbank(config).to(power) @ power


def log_mel(
    waveforms: Float[Tensor, "B samples"],
    config: MelConfig = MelConfig(),
    sample_rate: int | None = None,
) -> Float[Tensor, "B mels frames"]:
    r"""Turn sound into the image that speech models read.

    $$ \ln(M + \epsilon) \qquad\text{or}\qquad \tfrac{20}{p} \log_{10} \max(M, 10^{-10}) $$

    where p is `power`, 2 for energies. The logarithm turns a factor of loudness into a shift, and
    the offset keeps silence finite: how large it is decides how much faint noise the model sees.
    Time runs along the last axis, as in a picture of it; transpose for a sequence of frames.

    Raises: ValueError as `mel_spectrogram` does, and when `sample_rate`, that of the waveforms, is
    given and is not the config's: the same word would sit in other bands, at another tempo.
    """
    if sample_rate is not None and sample_rate != config.sample_rate:
        raise ValueError(
            f"sample_rate={sample_rate}, but the spectrogram is set for {config.sample_rate} Hz; "
            f"call resample(waveforms, {sample_rate}, {config.sample_rate}) first"
        )
    mels = mel_spectrogram(waveforms, config)
    if config.decibels:
        # 10 log10 of an energy is 20 log10 of a magnitude: the same number of decibels
        return (20 / config.power) * torch.log10(mels.clamp(min=FAINTEST))
    return torch.log(mels + config.log_offset)


FAINTEST = 1e-10  # -100 dB: below what 16 bits can hold


def invert_log_mel(
    log_mels: Float[Tensor, "B mels frames"],
    config: MelConfig = MelConfig(),
    num_iterations: int = 32,
    generator: torch.Generator | None = None,
) -> Float[Tensor, "B samples"]:
    """Make a sound that has this log-mel spectrogram, or nearly: hear what the encoding kept.

    The logarithm is undone exactly; the bands are spread over their frequencies by the filterbank's
    pseudo-inverse (the finest detail is gone); the phase, lost altogether, is guessed by
    `griffin_lim`. The sound has (frames - 1) * hop_length samples.

    Raises: ValueError for a config without `center` or with `pad`, whose ends cannot be inverted.
    """
    if not config.center or config.pad:
        raise ValueError(
            f"center={config.center} and pad={config.pad} cannot be inverted; "
            "use MelConfig(center=True, pad=0)"
        )
    if config.decibels:
        mels = 10 ** (log_mels * config.power / 20)
    else:
        mels = log_mels.exp() - config.log_offset
    power = torch.linalg.pinv(mel_filterbank(config)).to(mels) @ mels
    magnitudes = power.clamp(min=0) ** (1 / config.power)
    return griffin_lim(magnitudes, config, num_iterations, generator)


def griffin_lim(
    magnitudes: Float[Tensor, "B frequencies frames"],
    config: MelConfig,
    num_iterations: int = 32,
    generator: torch.Generator | None = None,
) -> Float[Tensor, "B samples"]:
    r"""Guess the phase: find a sound whose spectrogram has these magnitudes.

    $$ x \leftarrow F^{-1}\!\left(M\, \frac{F(x)}{|F(x)|}\right), \qquad
       F = \text{short-time Fourier transform} $$

    Frames overlap, so most phases contradict their neighbours: no sound has them. Each round makes
    the sound nearest to the wanted spectrogram and takes over its phases. The distance never grows,
    and rarely reaches zero: that is the metallic tone of such reconstructions.
    Source: Griffin and Lim 1984, the algorithm they call LSEE-MSTFTM.
    """
    options = {
        "n_fft": config.n_fft,
        "hop_length": config.hop_length,
        "win_length": config.window_length,
        "window": hann_window(config.window_length).to(magnitudes),
    }
    phases = 2 * math.pi * torch.rand(magnitudes.shape, generator=generator).to(magnitudes)
    for _ in range(num_iterations):
        waveforms = torch.istft(torch.polar(magnitudes, phases), **options)
        phases = torch.stft(waveforms, return_complex=True, **options).angle()
    return torch.istft(torch.polar(magnitudes, phases), **options)


def resample(
    waveforms: Float[Tensor, "B samples"],
    old_rate: int,
    new_rate: int,
    *,
    zero_crossings: int = 6,
    rolloff: float = 0.99,
) -> Float[Tensor, "B new_samples"]:
    r"""Change the sampling rate, without letting high notes come back as low ones.

    $$ y_j = \sum_i x_i\; g\!\Big(\frac{i}{r_{\text{old}}} - \frac{j}{r_{\text{new}}}\Big), \qquad
       g(t) \propto \mathrm{sinc}(2ct)\,\cos^2\!\Big(\frac{\pi t c}{Z}\Big)
       \quad\text{for } |2ct| < Z $$

    A band-limited wave can be read between its samples by a sum of sincs, exactly in theory; here
    each sinc is faded out after Z zero crossings. The cut-off c lies just below half of the
    *smaller* rate. Taking every other sample instead keeps what lies above: a tone at
    r_new / 2 + 100 Hz comes back as one at r_new / 2 - 100 Hz, and nothing can tell them apart.

    Raises: ValueError for rates that are not positive, and as `check_waveforms` does.
    Source: Smith 2002, "Digital Audio Resampling"; the same numbers as torchaudio's.
    """
    _check_positive(old_rate=old_rate, new_rate=new_rate, zero_crossings=zero_crossings)
    check_waveforms(waveforms)
    if old_rate == new_rate:
        return waveforms
    num_samples = math.ceil(waveforms.shape[1] * new_rate / old_rate)
    # 44,100 to 16,000 is 441 to 160: every 441 old samples the same 160 filters come round.
    divisor = math.gcd(old_rate, new_rate)
    old, new = old_rate // divisor, new_rate // divisor
    bandwidth = min(old, new) * rolloff  # twice the cut-off
    reach = math.ceil(zero_crossings * old / bandwidth)  # samples that a filter sees to each side

    i = torch.arange(-reach, reach + old, dtype=torch.float64)
    j = torch.arange(new, dtype=torch.float64)[:, None]
    t = ((i / old - j / new) * bandwidth).clamp(-zero_crossings, zero_crossings)
    fade = torch.cos(math.pi * t / zero_crossings / 2) ** 2
    filters = torch.sinc(t) * fade * (bandwidth / old)

    padded = F.pad(waveforms, (reach, reach + old))[:, None]
    resampled = F.conv1d(padded, filters[:, None].to(waveforms), stride=old)
    return resampled.transpose(1, 2).flatten(1)[:, :num_samples]


def kaldi_fbank(
    waveforms: Float[Tensor, "B samples"], sample_rate: int = 16_000, n_mels: int = 128
) -> Float[Tensor, "B mels frames"]:
    r"""Compute log-mel as Kaldi does: what AST and Meta-Transformer were trained on.

    25 ms frames every 10 ms, only where one fits. Each loses its mean, is sharpened
    ($x_n - 0.97\,x_{n-1}$, which lifts high frequencies), faded by the *symmetric* Hann window and
    padded to a power of two. The triangles are straight in mels, not in hertz, from 20 Hz up; the
    Nyquist frequency is left out. A model trained on one kind of log-mel fails on the other. (AST's
    paper says Hamming window; its code, and hence its weights, have Hann's.)

    Raises: ValueError for a sampling rate that is not positive, or a sound shorter than one frame.
    Source: Kaldi, feat/feature-fbank.cc; Gong et al. 2021 (AST), section 2.1.
    """
    _check_positive(sample_rate=sample_rate, n_mels=n_mels)
    length, hop_length = sample_rate * 25 // 1000, sample_rate * 10 // 1000
    check_waveforms(waveforms, max(2, length))
    n_fft = 2 ** math.ceil(math.log2(length))

    frames = waveforms.unfold(-1, length, hop_length)
    frames = frames - frames.mean(dim=-1, keepdim=True)
    before = torch.cat([frames[..., :1], frames[..., :-1]], dim=-1)
    frames = (frames - 0.97 * before) * torch.hann_window(length, periodic=False).to(frames)
    power = torch.fft.rfft(frames, n=n_fft).abs() ** 2

    frequencies = torch.arange(n_fft // 2, dtype=torch.float64) * (sample_rate / n_fft)
    mels = hertz_to_mel(frequencies)
    ends = hertz_to_mel(torch.tensor([20.0, sample_rate / 2], dtype=torch.float64))
    step = (ends[1] - ends[0]) / (n_mels + 1)
    peaks = ends[0] + step * torch.arange(1, n_mels + 1)[:, None]
    triangles = (1 - (mels - peaks).abs() / step).clamp(min=0).to(power)
    energies = power[..., :-1] @ triangles.T
    return energies.clamp(min=torch.finfo(torch.float32).eps).log().transpose(1, 2)


class SpectrogramPatches(nn.Module):
    r"""Cut a spectrogram into squares that overlap, and map each, flattened, to a token.

    $$ L = \Big(\Big\lfloor\frac{\text{mels} - p}{s}\Big\rfloor + 1\Big)
           \Big(\Big\lfloor\frac{\text{frames} - p}{s}\Big\rfloor + 1\Big) $$

    With patches of p = 16 every s = 10, 128 mels and 1024 frames (10.24 s) make 12 × 101 = 1212
    tokens. What does not fill a patch at the upper end is dropped. Tokens come band by band, each
    from first to last moment. It is `vision.PatchEmbedding` with a stride smaller than the patch.

    Raises: ValueError for a spectrogram smaller than one patch, or of another size than built for.
    Source: Gong et al. 2021 (AST), section 2.1; Zhang et al. 2023, section 3.2.
    """

    def __init__(
        self,
        n_mels: int,
        num_frames: int,
        d_model: int,
        patch_size: int = 16,
        stride: int = 10,
    ):
        super().__init__()
        _check_positive(patch_size=patch_size, stride=stride)
        if n_mels < patch_size or num_frames < patch_size:
            raise ValueError(
                f"n_mels={n_mels} and num_frames={num_frames} do not hold one patch of "
                f"patch_size={patch_size}; take smaller patches or pad the spectrogram"
            )
        self.n_mels, self.num_frames = n_mels, num_frames
        self.patch_size, self.stride = patch_size, stride
        self.grid = ((n_mels - patch_size) // stride + 1, (num_frames - patch_size) // stride + 1)
        self.num_patches = self.grid[0] * self.grid[1]
        self.projection = nn.Linear(patch_size**2, d_model)

    def forward(self, log_mels: Float[Tensor, "B mels frames"]) -> Float[Tensor, "B L D"]:
        if log_mels.shape[1:] != (self.n_mels, self.num_frames) or len(log_mels) == 0:
            raise ValueError(
                f"log_mels have shape {tuple(log_mels.shape)}, but this model reads (batch, "
                f"{self.n_mels}, {self.num_frames}); pad or cut them to that many frames first"
            )
        patches = F.unfold(log_mels[:, None], self.patch_size, stride=self.stride)
        return self.projection(patches.transpose(1, 2))


def _padded_window(config: MelConfig) -> Float[Tensor, "n_fft"]:
    """Return the window in the middle of n_fft samples, zeros around it."""
    missing = config.n_fft - config.window_length
    return F.pad(hann_window(config.window_length), (missing // 2, missing - missing // 2))


def _check_scale(mel_scale: str) -> None:
    if mel_scale not in ("htk", "slaney"):
        raise ValueError(f"mel_scale={mel_scale!r} is not known; choose 'htk' or 'slaney'")
