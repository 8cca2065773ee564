"""Writes a checkpoint as OpenVINO reads it: python export_openvino.py MODEL OUT"""

import sys

from optimum.intel import OVModelForCausalLM

model = OVModelForCausalLM.from_pretrained(sys.argv[1], export=True, compile=False, load_in_8bit=False)
model.save_pretrained(sys.argv[2])
