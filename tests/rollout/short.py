"""The planar environment with short episodes, in a module that a rollout process imports in no time."""

from envs.planar import PlanarEnv


class ShortPlanar(PlanarEnv):
    """Cut off after 20 to 27 control steps, which the seed decides."""

    def reset(self, *, seed=None, options=None):
        self.left = 20 + seed % 8
        return super().reset(seed=seed, options=options)

    def step(self, action):
        self.left -= 1
        observation, reward, terminated, truncated, info = super().step(action)
        return observation, reward, terminated, truncated or self.left == 0, info
