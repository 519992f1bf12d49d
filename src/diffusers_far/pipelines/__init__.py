from .pipeline_far import FARPipeline, FARPipelineOutput
from .session import FARSession
from .session_pool import SessionPool
