import sys
from pathlib import Path

# tests share `distributed.py`; spawned ranks must find it as well
sys.path.insert(0, str(Path(__file__).parent))
