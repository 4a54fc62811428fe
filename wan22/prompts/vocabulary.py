"""The terms that Wan's prompt guide names, by what they control.

Source: Alibaba Cloud Model Studio, "Text-to-video and image-to-video prompt guide", its prompt dictionary;
and the lists in Wan2.2 wan/utils/system_prompt.py. The terms are theirs, in one spelling.
"""

from collections.abc import Mapping
from types import MappingProxyType

_TERMS = {
    "light_source": (
        "daylight, clear sky light, sunny light, overcast light, moonlight, firelight, "
        "artificial light, practical light, fluorescent light, mixed light"
    ),
    "lighting": (
        "soft light, hard light, top light, side light, backlight, underlight, rim light, "
        "edge light, silhouette, low contrast, high contrast"
    ),
    "time_of_day": "dawn, sunrise, daytime, golden hour, sunset, dusk, night",
    "shot_size": (
        "extreme close-up, close-up, medium close-up, medium shot, medium wide shot, full shot, "
        "wide shot, extreme wide shot"
    ),
    "angle": (
        "eye-level shot, high-angle shot, low-angle shot, dutch angle shot, aerial shot, "
        "top-down shot, overhead shot, over-the-shoulder shot"
    ),
    "shot_type": "clean single shot, two-shot, three-shot, group shot, establishing shot",
    "composition": (
        "center composition, balanced composition, left-heavy composition, "
        "right-heavy composition, symmetrical composition, short-side composition"
    ),
    "lens": "medium lens, wide-angle lens, long-focus lens, telephoto lens, fisheye lens",
    "camera_movement": (
        "camera pushes in, camera pulls back, camera pans left, camera pans right, "
        "camera moves left, camera moves right, camera tilts up, camera tilts down, "
        "tracking shot, arc shot, orbiting shot, handheld camera, compound camera movement, "
        "fixed camera"
    ),
    "tone": "warm tones, cool tones, mixed tones, high saturation, low saturation",
    "emotion": "happy, sad, angry, fearful, surprised, pensive, calm",
    "motion": (
        "walking, running, jumping, dancing, street dance, swimming, cycling, skiing, "
        "snowboarding, surfing, skateboarding, football, basketball, tennis, table tennis, "
        "cartwheel"
    ),
    "style": (
        "felt style, 3D cartoon, pixel art, puppet animation, 3D game, claymation, anime, "
        "watercolor, black-and-white animation, oil painting, line art illustration, "
        "paper-cut style, cyberpunk, surreal style"
    ),
    "effect": "tilt-shift photography, time-lapse photography",
}
VOCABULARY: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {name: tuple(terms.split(", ")) for name, terms in _TERMS.items()}
)
