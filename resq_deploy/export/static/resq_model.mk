# include BUNDLE/resq_model.mk: where the bundle is and what to compile.
#
#   RESQ_MODEL_DIR            folder of this bundle
#   RESQ_MODEL_CPPFLAGS       for everything that includes its headers
#   RESQ_MODEL_SOURCES        the stored tensors, the checks of them, and their decoder where they
#                             are encoded (link it with -lm)
#   RESQ_MODEL_TEST_SOURCES   with the above: a program that replays the golden vectors

RESQ_MODEL_DIR := $(patsubst %/,%,$(dir $(lastword $(MAKEFILE_LIST))))
RESQ_MODEL_CPPFLAGS := -I$(RESQ_MODEL_DIR)
RESQ_MODEL_SOURCES := $(addprefix $(RESQ_MODEL_DIR)/,weights.c resq_check.c) \
    $(wildcard $(RESQ_MODEL_DIR)/decode.c)
RESQ_MODEL_TEST_SOURCES := $(addprefix $(RESQ_MODEL_DIR)/,golden.c resq_replay.c)
