# bash completion for umem
_umem() {
    # The line up to the cursor in words of its own: bash would cut them at every colon and equals sign.
    local line=${COMP_LINE:0:COMP_POINT} words answer others word typed
    read -ra words <<<"$line"
    [[ $line == *[[:space:]] ]] && words+=("")
    typed=${words[${#words[@]} - 1]}
    mapfile -t answer < <("${words[0]}" __complete "${words[@]:1}" 2>/dev/null)
    others=${answer[0]:-files}
    COMPREPLY=()
    case $others in
        command\ *)
            local begin=$((${others#command } + 1))
            if declare -F _command_offset >/dev/null; then
                _command_offset "$begin"
            elif ((${#words[@]} == begin + 1)); then
                mapfile -t COMPREPLY < <(compgen -c -- "$typed")
            else
                mapfile -t COMPREPLY < <(compgen -f -- "$typed")
            fi
            return
            ;;
        files)
            compopt -o filenames 2>/dev/null
            mapfile -t COMPREPLY < <(compgen -f -- "${typed#*=}")
            return
            ;;
    esac
    # bash replaces what stands behind the last of its own word breaks.
    local cut=${typed%"${typed##*[:=]}"}
    for word in "${answer[@]:1}"; do
        word=${word%%$'\t'*}
        COMPREPLY+=("${word#"$cut"}")
    done
    if [[ ${#COMPREPLY[@]} == 1 && ${COMPREPLY[0]} == *[:=] ]]; then
        compopt -o nospace 2>/dev/null
    fi
}
complete -F _umem umem
