"""Readers of people's own data, one per layout."""

from .class_folder import ClassFolderSource
from .lerobot import LeRobotSource
from .npz import NpzSource
from .split_folders import open_split_folders
from .trajectory import Trajectory, TrajectorySource
from .video_folder import VideoFolderSource


SOURCES = {
    "npz": NpzSource,
    "classfolder": ClassFolderSource,
    "videofolder": VideoFolderSource,
    "lerobot": LeRobotSource,
}
