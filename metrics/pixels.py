"""SSIM and PSNR of frames uint8 (F, H, W, 3), one value a frame: scikit-image's."""

from functools import partial

import numpy as np
from scipy.ndimage import gaussian_filter1d
from skimage.color import rgb2gray
from skimage.metrics import peak_signal_noise_ratio, structural_similarity


def ssim(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """SSIM (F,), channels apart, windows of 7 x 7. Raises ValueError for smaller frames."""
    _, H, W, _ = a.shape
    if min(H, W) < 7:
        raise ValueError(f"SSIM: frames of {H} x {W} pixels, wanted at least 7 x 7: --size 256")
    similarity = partial(structural_similarity, data_range=255, channel_axis=-1)
    return np.array(list(map(similarity, a, b)))


def ssim_gray(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """SSIM (F,) as in the public code of MindEye and NEURONS: gray in 0 ... 1, Gaussian windows of sigma 1.5,
    and channel_axis=-1, by which scikit-image takes the columns of a gray picture for channels: the windows
    are columns of 11 pixels. scikit-image loops over them, which takes 7 to 25 times as long as this."""

    def blur(v: np.ndarray) -> np.ndarray:
        return gaussian_filter1d(v, 1.5, axis=1, truncate=3.5)[:, 5:-5]

    if a.shape[1] < 11:
        raise ValueError(f"SSIM gray: frames of {a.shape[1]} rows, wanted at least 11: --size 256")
    x, y = rgb2gray(a), rgb2gray(b)  # (F, H, W)
    C_1, C_2 = 0.01**2, 0.03**2
    m_x, m_y = blur(x), blur(y)
    variances = blur(x * x) + blur(y * y) - m_x**2 - m_y**2
    covariance = blur(x * y) - m_x * m_y
    similarity = (2 * m_x * m_y + C_1) * (2 * covariance + C_2)
    return (similarity / ((m_x**2 + m_y**2 + C_1) * (variances + C_2))).mean((1, 2))


def psnr(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """PSNR (F,) in dB. Equal frames count as one number off by one (101 dB at 256 x 256), not as infinity."""
    equal = 10 * np.log10(255**2 * a[0].size)
    values = []
    for x, y in zip(a, b, strict=True):
        values.append(equal if np.array_equal(x, y) else peak_signal_noise_ratio(x, y, data_range=255))
    return np.array(values)
