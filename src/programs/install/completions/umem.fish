# fish completion for umem
function __umem_complete
    set -l words (commandline -opc)
    set -l typed (commandline -ct)
    set -l answer ($words[1] __complete $words[2..-1] "$typed" 2>/dev/null)
    switch "$answer[1]"
        case 'command *'
            set -l begin (math (string replace 'command ' '' -- $answer[1]) + 2)
            set -l rest
            if test (count $words) -ge $begin
                set rest (string escape -- $words[$begin..-1])
            end
            complete -C (string join ' ' -- $rest "$typed")
        case files ''
            __fish_complete_path (string replace -r '^--[^=]*=' '' -- "$typed")
        case '*'
            if test (count $answer) -gt 1
                printf '%s\n' $answer[2..-1]
            end
    end
end
complete -c umem -f -a '(__umem_complete)'
