"""MuJoCo's pictures through the interface of mujoco_py's off-screen context."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from tt_fast.validate import require_int
from tt_fast.video import offscreen_renderer, open_gl

Picture = NDArray[np.uint8]


class OffscreenContext:
    """Draws a simulation without a window: set `cam`, call `render`, then `read_pixels`.

    As `mujoco_py.MjRenderContextOffscreen` (mujoco_py 2.0, `mjrendercontext.pyx`): the camera is
    free, looks at the median of the bodies' shapes from as far as the model is large, and the rows
    of a picture come bottom up.

    Args:
        sim: has `model` (MjModel) and `data` (MjData), both live: `legacy_gym.Simulation`.
        device_id: not used; OpenGL chooses.

    Raises:
        ImportError: MuJoCo is missing.
        RenderError: no OpenGL on this machine.
    """

    def __init__(self, sim: Any, device_id: int = -1) -> None:
        import mujoco

        self.sim, self._mujoco = sim, mujoco
        offscreen = sim.model.vis.global_
        self._size = (int(offscreen.offwidth), int(offscreen.offheight))
        self._gl, self._context = open_gl(sim.model, self._size)
        self.scn = mujoco.MjvScene(sim.model, maxgeom=1000)
        self.vopt, self.pert = mujoco.MjvOption(), mujoco.MjvPerturb()
        self.cam = self._free_camera()

    def render(self, width: int, height: int, camera_id: int | None = None) -> None:
        """Draw the current state in so many pixels, with `cam` or a camera of the model."""
        mujoco, model = self._mujoco, self.sim.model
        width, height = require_int("width", width, 1, 4096), require_int("height", height, 1, 4096)
        if camera_id is not None:
            fixed = camera_id >= 0
            kind = mujoco.mjtCamera
            self.cam.type = kind.mjCAMERA_FIXED if fixed else kind.mjCAMERA_FREE
            self.cam.fixedcamid = camera_id
        self._gl.make_current()
        self._grow(width, height)
        everything = mujoco.mjtCatBit.mjCAT_ALL
        mujoco.mjv_updateScene(
            model, self.sim.data, self.vopt, self.pert, self.cam, everything, self.scn
        )
        mujoco.mjr_render(mujoco.MjrRect(0, 0, width, height), self.scn, self._context)

    def read_pixels(self, width: int, height: int, depth: bool = True) -> Any:
        """What `render` drew: (height, width, 3) uint8, the lowest row first.

        Args:
            width, height: as `render` had them.
            depth: return a pair, the second of it depths (height, width) in [0, 1].
        """
        self._gl.make_current()
        picture = np.empty((height, width, 3), np.uint8)
        depths = np.empty((height, width), np.float32) if depth else None
        rectangle = self._mujoco.MjrRect(0, 0, width, height)
        self._mujoco.mjr_readPixels(picture, depths, rectangle, self._context)
        return (picture, depths) if depth else picture

    def close(self) -> None:
        """Free what OpenGL holds."""
        self._gl.make_current()
        self._context.free()
        self._gl.free()

    def _grow(self, width: int, height: int) -> None:
        """A picture of this size fits into the buffer."""
        if width <= self._size[0] and height <= self._size[1]:
            return
        self._size = (max(width, self._size[0]), max(height, self._size[1]))
        offscreen = self.sim.model.vis.global_
        offscreen.offwidth, offscreen.offheight = self._size
        self._context.free()
        self._context = offscreen_renderer(self.sim.model)

    def _free_camera(self) -> Any:
        camera = self._mujoco.MjvCamera()
        camera.type = self._mujoco.mjtCamera.mjCAMERA_FREE
        camera.fixedcamid = -1
        camera.lookat[:] = np.median(self.sim.data.geom_xpos, axis=0)
        camera.distance = self.sim.model.stat.extent
        return camera


def opengl_problem() -> str | None:
    """Why no picture can be drawn on this machine; None if one can."""
    try:
        import mujoco

        gl, context = open_gl(mujoco.MjModel.from_xml_string("<mujoco/>"), (64, 64))
    except Exception as error:  # MuJoCo's import fails with any type if MUJOCO_GL names what is not
        return " ".join(str(error).split())
    context.free()
    gl.free()
    return None
