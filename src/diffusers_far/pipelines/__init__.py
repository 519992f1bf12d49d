from .pipeline_far import FARPipeline, FARPipelineOutput
from .session import FARSession
