# Completion of make's goals, steps, studies and variables in this project, for bash and zsh:
#
#     . scripts/completion.bash
#
# Names come from `scripts/listing.py --plain` at every Tab, so a new step or study is known at once. In other folders make
# completes as it did before.

if [ -n "${ZSH_VERSION:-}" ]; then
    (( $+functions[compdef] )) || { autoload -Uz compinit && compinit -u -D; }
    autoload -Uz bashcompinit && bashcompinit
elif declare -F _completion_loader >/dev/null; then
    _completion_loader make  # bash-completion's own, which is loaded at the first Tab otherwise
fi

_kablate_before=
if [ -z "${ZSH_VERSION:-}" ]; then
    _kablate_before=$(complete -p make 2>/dev/null | sed -n 's/.* -F \([^ ]*\) .*/\1/p')
    [ "$_kablate_before" = _kablate_make ] && _kablate_before=_make
    declare -F "$_kablate_before" >/dev/null || _kablate_before=
fi

_kablate_names() {
    local python=.venv/bin/python
    [ -x "$python" ] || python=python3
    "$python" -S -m scripts.listing "$@" --plain 2>/dev/null
}

_kablate_make() {
    local word=$2 line=${COMP_LINE:0:$COMP_POINT} head="" words="" one
    COMPREPLY=()
    if ! { [ -f scripts/listing.py ] && [ -f lib/literal.mk ] && [ -f Makefile ]; }; then
        if [ -n "$_kablate_before" ]; then
            "$_kablate_before" "$@"
        else
            COMPREPLY=($(compgen -f -- "$word"))
        fi
        return
    fi
    [ -n "${ZSH_VERSION:-}" ] || word=${line##*[[:space:]]}  # bash breaks words at = and @ too
    case $word in
        STEP=*) head=STEP= words=$(_kablate_names steps) ;;
        STUDY=*) head=STUDY= words=$(_kablate_names defconfigs) ;;
        *=*) head=${word%%=*}= words=$(ls -d -- "${word#*=}"* 2>/dev/null) ;;
        defconfig-*+*) head=${word%+*}+ words=$(_kablate_names fragments) ;;
        defconfig-*) head=defconfig- words=$(_kablate_names defconfigs) ;;
        *) words=$(_kablate_names goals steps; echo defconfig-; _kablate_names variables | sed 's/$/=/') ;;
    esac
    # Of what is completed bash wants only what follows its last break.
    local kept=$head
    [ -n "${ZSH_VERSION:-}" ] || case $head in *=) kept= ;; esac
    while IFS= read -r one; do  # names are compared, never expanded: what a file is called executes nothing
        case $one in "${word#"$head"}"*) COMPREPLY+=("$kept$one") ;; esac
    done <<< "$words"
    case ${COMPREPLY[*]} in  # more of the same word follows
        *= | defconfig-*) [ -n "${ZSH_VERSION:-}" ] || compopt -o nospace ;;
    esac
}

if [ -n "${ZSH_VERSION:-}" ]; then
    complete -o nospace -F _kablate_make make
else
    complete -F _kablate_make make
fi
