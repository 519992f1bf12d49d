from .pipeline_far import FARPipeline
from .pipeline_output import FARPipelineOutput
from .pipeline_video_dit import VideoDiTPipeline
from .session import FARSession
