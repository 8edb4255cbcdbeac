# What stands on make's command line is data: without this, make would run the $(shell ...) in OUT='$(shell ...)', and read
# '#' as a comment. Each such variable gets the text that was given as its value. PYTHON stays make's, because it names a
# program, and Q the Makefile's, because it begins every recipe. Read by the Makefile, and before the cells.mk of a plan.
$(foreach v,$(.VARIABLES),$(if $(filter command,$(firstword $(origin $(v)))),\
  $(if $(filter PYTHON Q,$(v)),,$(eval override export $(v) := $$(value $(v))))))
ifeq ($(firstword $(origin Q)),command)
override Q := @
endif
